"""What the families of diffusers pipelines share: loading, geometry, grids, guidance, decoding.

A family adds the call of its transformer, the call of its text encoders and the way from its
latents to the autoencoder's. Latents are plain (B, C, H, W) everywhere outside `_forward`.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiltflow.flow import raw_levels
from tiltflow.models.backbone import Conditioning, Loading
from tiltflow.models.family import Family
from tiltflow.models.medium import IMAGES, VIDEOS, Medium
from tiltflow.models.pipelines.directory import Pipeline
from tiltflow.models.pipelines.files import check_directory
from tiltflow.models.pipelines.geometry import Geometry, check_axes, geometry_of, grid, shift_of
from tiltflow.models.pipelines.guidance import both_passes
from tiltflow.models.pipelines.loading import load_part, load_pipeline
from tiltflow.models.pipelines.parts import check_twin, part_config
from tiltflow.models.pipelines.storage import input_dtype, keep_in_fp8

TIMESTEPS = 1000.0
"""Transformers are trained on σ times this; it never leaves the adapters."""


class PipelineBackbone(ABC):
    """A diffusers pipeline's parts behind the `Backbone` protocol; weights are frozen.

    Args:
        family: the record of the family.
        pipeline: a directory that the family's pipeline saved.
        loading: precision, sizes, parts.
        generator: a directory whose transformer the generator starts from, for families that take
            one (`Family.twin`); None starts it from the teacher. Only its transformer is loaded.
        pipe: a pipeline made already, in place of loading the one in `pipeline`; with
            `generator_network`, made already too, and `generator_config`, its pipeline's index.

    Raises:
        ValueError: before weights load, if the directory is not a complete pipeline of the family,
            the resolution does not fit the model, its parts are not of one model, or those of
            `generator` are not of the same size.
    """

    default_guidance: ClassVar[float]
    embedded_guidance: float | None = None
    """The scale that a network which takes it as an input is given when none is asked for."""
    default_sequence: ClassVar[int]
    longest_sequence: ClassVar[int] = 512
    """What the pipelines' own calls refuse to go beyond; klein's tokenizer length in diffusers."""
    axes: ClassVar[int] = 0
    """How many coordinates a token's position has, where they are turned into rotations."""
    prompts_first: ClassVar[bool] = False
    """Whether the prompts come before the empty one in the pipeline's batch for guidance."""
    shifted: ClassVar[bool] = True
    """Whether latents are shifted on their way to the autoencoder, where it says by how much."""
    hands_levels: ClassVar[bool] = True
    """Whether the pipeline's call hands levels to its scheduler, and not their number alone."""
    packing: int
    """How many values of one latent channel a token holds side by side as channels."""
    ragged: ClassVar[bool] = False
    """Whether the pipeline fills prompts up to the longest of a batch, so that an embedding's last
    bits depend on what is encoded with it: then each is encoded alone (`data.embeddings`)."""

    def __init__(
        self,
        family: Family,
        pipeline: Pipeline,
        loading: Loading,
        generator: Pipeline | None = None,
        *,
        pipe: Any = None,
        generator_network: nn.Module | None = None,
        generator_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.record, self.family, self.pipeline = family, family.name, pipeline
        self.path = str(pipeline)
        if pipe is None:
            check_directory(pipeline)
            self._check_parts()
        if generator is not None:
            check_directory(generator)
            self._check_teacher()
            check_twin(family, pipeline, generator)
        self.device = torch.device(loading.device)
        transformer, vae = self._part_configs(pipe)
        self.geometry = self._geometry(transformer, vae, loading)
        self.resolution = self.geometry.resolution
        self.medium: Medium = IMAGES if self.geometry.frames == 1 else VIDEOS
        self.latent_shape = self._latent_shape(int(transformer["in_channels"]))
        self.guidance = float(pipeline.side.get("guidance", self.default_guidance))
        self.sequence = self._sequence(loading)
        self.batched_guidance = True
        """Whether both passes of classifier-free guidance run as one batch of twice the size."""
        self.parts = loading.parts
        self.generator_config = generator.index if generator is not None else generator_config
        self.pipe = pipe or load_pipeline(pipeline, loading)
        self.transformer: nn.Module = self.pipe.transformer
        self.vae = self.pipe.vae
        self.scheduler = self.pipe.scheduler
        self.lost: dict[str, float] = {}
        """What 8 bits take away, as `keep_in_fp8` gives it."""
        self._freeze(loading)
        self._begin()
        self.generator_transformer = self.transformer
        """What the generator starts from."""
        if generator is not None and self.parts != "text":
            empty = loading.base == "empty"
            generator_network = load_part(generator, "transformer", loading.dtype, empty)
        if generator_network is not None:
            self._take_generator(generator_network, str(generator), loading)

    def _sequence(self, loading: Loading) -> int:
        found = int(self.pipeline.side.get("max_sequence_length", self.default_sequence))
        if loading.max_sequence_length is not None:
            found = loading.max_sequence_length
        shortest = self._shortest_sequence()
        if not shortest <= found <= self.longest_sequence:
            raise ValueError(
                f"model.max_sequence_length={found} must be from {shortest} "
                f"to {self.longest_sequence}, the limit of {self.record.pipeline}"
            )
        return found

    def _part_configs(self, pipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The transformer's and the autoencoder's, without loading them."""
        if pipe is not None:
            return dict(pipe.transformer.config), dict(pipe.vae.config)
        part = self.part_config
        return part(self.pipeline, "transformer"), part(self.pipeline, "vae")

    def part_config(self, pipeline: Pipeline, part: str) -> dict[str, Any]:
        """A part's configuration without loading it: its config.json over its class's defaults."""
        return part_config(self.record, pipeline, part)

    def _freeze(self, loading: Loading) -> None:
        if loading.fp8 and self.parts != "text":
            self.lost |= keep_in_fp8(self.transformer, loading.dtype, self.path)
        for name in self._networks():
            network = getattr(self.pipe, name).requires_grad_(False).eval()
            if name != "transformer" or loading.base == "device":
                network.to(self.device)

    def _take_generator(self, network: nn.Module, where: str, loading: Loading) -> None:
        if loading.fp8:
            self.lost |= keep_in_fp8(network, loading.dtype, where)
        self.generator_transformer = network.requires_grad_(False).eval()
        if loading.base == "device":
            network.to(self.device)

    # ---- what a family adds

    @abstractmethod
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each conditioning tensor, without its batch; what `encode` will give."""

    @abstractmethod
    def _forward(
        self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        """One pass of a transformer: the velocity (B, C, H, W) in fp32."""

    @abstractmethod
    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """The prompts through the pipeline's own text encoders."""

    def _encode_negative(self) -> dict[str, Tensor]:
        """One row: the empty prompt as the pipeline's negative one."""
        return self._encode([""])

    @abstractmethod
    def _to_vae(self, latents: Tensor) -> Tensor:
        """fp32 latents as the autoencoder's decoder takes them."""

    def _check_parts(self) -> None:  # noqa: B027
        """Raises ValueError where the parts' configurations do not go together."""

    def _begin(self) -> None:  # noqa: B027
        """What a family does when its pipeline is loaded."""

    def _check_teacher(self) -> None:  # noqa: B027
        """Raises ValueError where the model cannot teach another generator than its own."""

    def _networks(self) -> list[str]:
        """The pipeline's parts that have weights here."""
        encoders = self.record.text_encoders
        text = [name for name in encoders if getattr(self.pipe, name) is not None]
        return text if self.parts == "text" else [*text, "transformer", "vae"]

    def _shortest_sequence(self) -> int:
        """The fewest text tokens: none at all is no length that a tokenizer cuts to."""
        return 1

    def _factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels a latent cell."""
        return int(2 ** (len(vae["block_out_channels"]) - 1))

    def _latent_channels(self, vae: Mapping[str, Any]) -> int:
        return int(vae["latent_channels"])

    def _patch(self, transformer: Mapping[str, Any]) -> int:
        return 2

    def _default_latent(self, transformer: Mapping[str, Any]) -> int:
        """The side of the model's own resolution, in the autoencoder's cells."""
        return 128

    def _max_cells(self, transformer: Mapping[str, Any]) -> int | None:
        """The longest side in tokens that the transformer has positions for, if there is one."""
        return None

    def _latent_shape(self, channels: int) -> tuple[int, ...]:
        """Of a picture without frames."""
        frames = self.geometry.latent_frames
        return (channels // self.packing, *([frames] if frames > 1 else []), *self.geometry.latent)

    def _raw_levels(self, steps: int) -> list[float]:
        """What the pipeline's call hands to its scheduler."""
        return raw_levels(steps)

    def _mu(self, steps: int) -> float:
        """The parameter of a resolution-dependent shift, by the pipeline's own formula."""
        return shift_of(self.scheduler.config, self.geometry.tokens, self.path)

    def _student_mu(self, steps: int) -> float:
        """The same by the pipeline that a student is sampled in: the generator's, if it has one."""
        return self._mu(steps)

    # ---- the protocol

    @property
    def student_base(self) -> nn.Module:
        return self.generator_transformer

    @property
    def teacher_base(self) -> nn.Module:
        return self.transformer

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """v(x, σ), fp32 (B, C, H, W), with classifier-free guidance unless `guidance` is 1 or
        None, or the network takes it as an input (`embedded_guidance`)."""
        if self.embedded_guidance is not None:
            scale = self.embedded_guidance if guidance is None else guidance
            given = torch.full_like(sigma, scale, dtype=torch.float32)
            return self._forward(network, x, sigma, {**cond.positive, "guidance": given})
        if guidance is None or guidance == 1.0:
            return self._forward(network, x, sigma, cond.positive)
        plain, conditional = both_passes(
            partial(self._forward, network),
            x,
            sigma,
            cond,
            batched=self.batched_guidance,
            prompts_first=self.prompts_first,
        )
        return self._guide(plain, conditional, guidance)

    def _guide(self, plain: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """The guided velocity, by the pipeline's own order of operations."""
        return plain + guidance * (conditional - plain)

    def passes(self, guidance: float) -> int:
        """How many passes of the network one velocity with `guidance` takes."""
        return 1 if guidance == 1.0 or self.embedded_guidance is not None else 2

    @property
    def student_guidance(self) -> float:
        """What a student is called with unless the recipe says otherwise: 1.0, a pass without, or
        the scale that its network takes as an input."""
        return 1.0 if self.embedded_guidance is None else self.embedded_guidance

    def lora_targets(self) -> str | list[str]:
        """The modules that adapters go on by default (METHOD §6)."""
        chosen = self.record.lora_targets
        return chosen if isinstance(chosen, str) else list(chosen)

    def input_dtype(self, network: nn.Module) -> torch.dtype:
        """The precision that a transformer's inputs are given in."""
        return input_dtype(network, self.record.input_weight)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts' conditioning; the negative is the family's negative prompt.

        Raises:
            RuntimeError: after `free_text_encoders`, or where they were not loaded.
        """
        if self.pipe.text_encoder is None:
            raise RuntimeError("the text encoders were freed: encode every prompt before training")
        # All rows of the negative are alike, so it is encoded once and not once a prompt.
        negative = {
            key: value.expand(len(prompts), *value.shape[1:])
            for key, value in self._encode_negative().items()
        }
        return Conditioning(self._encode(list(prompts)), negative)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] from latents, differentiable, fp32."""
        z = self._to_vae(latents.float()).to(self.vae.dtype)
        images = self.vae.decode(z, return_dict=False)[0].float()
        return self.medium.decode(images)

    def checkpoint_decoder(self) -> None:
        """Has a differentiable `decode` keep the ends of the decoder's blocks, and compute the rest
        again in the backward pass; the gradient is the same."""
        self.vae.enable_gradient_checkpointing()

    def fuse(self, mixed: bool = False) -> int:
        """For training in 16 bits, or with `mixed` in fp32 under autocast, before adapters go on:
        makes the transformer's blocks into ones that take fewer passes, where the family has them;
        how many there were."""
        return 0

    def few_step_sigmas(self, steps: int) -> Tensor:
        """Equal raw levels 1, ..., 1/K through the pipeline's own scheduler, then 0 (METHOD §1)."""
        own, wanted = self.scheduler, self.record.few_step_config(self.scheduler.config)
        if wanted != dict(own.config):
            from diffusers import FlowMatchEulerDiscreteScheduler

            known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
            own = FlowMatchEulerDiscreteScheduler(
                **{key: value for key, value in wanted.items() if key in known}
            )
        return self._schedule(own, steps, raw=True, student=True)

    def teacher_sigmas(self, steps: int) -> Tensor:
        """The grid of the pipeline's own call with this number of steps. A solver's steps are not
        Euler's: in its place are equal raw levels with its shift, as a student's."""
        if "flow_shift" in self.scheduler.config:
            return self.few_step_sigmas(steps)
        return self._schedule(self.scheduler, steps, raw=self.hands_levels)

    def _schedule(self, scheduler: Any, steps: int, raw: bool, student: bool = False) -> Tensor:
        own = self._student_mu if student else self._mu
        mu = own(steps) if scheduler.config.use_dynamic_shifting else None
        levels = self._raw_levels(steps)
        return grid(scheduler, steps, levels if raw else None, mu, self.path)

    def new_copy(self, of: str, seed: int) -> nn.Module:
        """A separate trainable fp32 copy of a base; `seed` is for families that draw weights.

        Raises:
            ValueError: if `of` is neither "student" nor "teacher".
        """
        if of not in ("student", "teacher"):
            raise ValueError(f"a copy is of 'student' or 'teacher', not of {of!r}")
        base = self.student_base if of == "student" else self.teacher_base
        return copy.deepcopy(base).float().requires_grad_(True)

    def free_text_encoders(self) -> None:
        """Drops what only `encode` needs."""
        for name in self.record.text_encoders:
            setattr(self.pipe, name, None)

    def thaw(self) -> None:
        """For sampling without gradient: weights marked as `from_pretrained` leaves them.

        torch's matmul asks `requires_grad` before it folds a batch into rows, and without grad mode
        too; with the marks of the pipeline's own, images are its own to the last bit.
        """
        for name in self._networks():
            getattr(self.pipe, name).requires_grad_(True)
        self.student_base.requires_grad_(True)

    # ---- checks

    def _geometry(
        self, transformer: Mapping[str, Any], vae: Mapping[str, Any], loading: Loading
    ) -> Geometry:
        channels, latent = transformer["in_channels"], self._latent_channels(vae)
        if channels != self.packing * latent:
            raise ValueError(
                f"the transformer in {self.path} takes {channels} channels but the autoencoder "
                f"makes {self.packing * latent} a token: these are not parts of one model"
            )
        if self.shifted and "shift_factor" in vae and vae["shift_factor"] is None:
            raise ValueError(f"the autoencoder in {self.path} has no shift_factor, which it needs")
        check_axes(transformer, self.axes, self.path)
        factor = self._factor(vae)
        patch = self._patch(transformer)
        size, most = loading.resolution, self._max_cells(transformer)
        size = self._default_latent(transformer) * factor if size is None else size
        step = int(vae["scale_factor_temporal"]) if self.record.videos else None
        return geometry_of(size, factor, patch, most, self.path, loading.size_name, step)

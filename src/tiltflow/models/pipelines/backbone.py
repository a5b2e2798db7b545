"""What SD3, FLUX.1 and FLUX.2 share: loading, geometry, grids, guidance, decoding.

A family adds the call of its transformer, the call of its text encoders and the way from its
latents to the autoencoder's. Latents are plain (B, C, H, W) everywhere outside `_forward`.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from tiltflow.flow import raw_levels
from tiltflow.models.backbone import Base, Conditioning, Parts
from tiltflow.models.medium import IMAGES, Medium
from tiltflow.models.pipelines.files import check_pipeline, read_json, side_file
from tiltflow.models.pipelines.loading import load_pipeline
from tiltflow.models.pipelines.storage import keep_in_fp8

TIMESTEPS = 1000.0
"""Transformers are trained on σ times this; it never leaves the adapters."""


LEVEL_KEYS = (
    "shift", "shift_terminal", "invert_sigmas", "use_dynamic_shifting", "base_shift", "max_shift",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
)  # fmt: skip
"""Of a scheduler's configuration: what the levels depend on."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of an image: `side` pixels, `factor` pixels a latent cell, `patch` cells a token."""

    side: int
    factor: int
    patch: int

    @property
    def latent(self) -> int:
        """The side in cells of the autoencoder's latent."""
        return self.side // self.factor

    @property
    def tokens(self) -> int:
        """The length of the image's token sequence."""
        return (self.side // (self.factor * self.patch)) ** 2


class PipelineBackbone(ABC):
    """A diffusers pipeline's parts behind the `Backbone` protocol; weights are frozen.

    Args:
        path: a directory that the family's pipeline saved.
        device: where everything runs.
        dtype: the frozen weights' precision; velocities and images are fp32 all the same.
        vae_dtype: the autoencoder's precision, by default `dtype`.
        resolution: image side in pixels; None is the model's own.
        max_sequence_length: text tokens (of the longest encoder); None is the side file's value,
            else the pipeline's own default.
        parts: "text" loads what `encode` needs and no more, "image" everything else.
        fp8: whether the transformer's matrices are kept in 8 bits, see `keep_in_fp8`.
        base: where the transformer is put, see `Base`.
        pipe: a pipeline made already, in place of loading the one in `path`.

    Raises:
        ValueError: before weights load, if the directory is not a complete pipeline of the family,
            the resolution does not fit the model, or its parts are not of one model.
    """

    family: str
    pipeline_class: ClassVar[Any]
    transformer_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    text_encoders: ClassVar[tuple[str, ...]]
    default_guidance: ClassVar[float]
    default_sequence: ClassVar[int]
    longest_sequence: ClassVar[int] = 512
    """What the pipelines' own calls refuse to go beyond; klein's tokenizer length in diffusers."""
    axes: ClassVar[int] = 0
    """How many coordinates a token's position has, where they are turned into rotations."""
    packing: ClassVar[int]
    """How many values of one latent channel a token holds side by side as channels."""

    def __init__(
        self,
        path: str | Path,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype | None = None,
        resolution: int | None = None,
        max_sequence_length: int | None = None,
        parts: Parts = "all",
        fp8: bool = False,
        base: Base = "device",
        pipe: Any = None,
    ) -> None:
        if pipe is None:
            check_pipeline(path, self.family)
        self.path = str(path)
        self.medium: Medium = IMAGES
        self.device = torch.device(device)
        transformer, vae = self._part_configs(pipe)
        self.geometry = self._geometry(transformer, vae, resolution)
        self.resolution = self.geometry.side
        self.latent_shape = self._latent_shape(int(transformer["in_channels"]))
        side = side_file(Path(path))
        self.guidance = float(side.get("guidance", self.default_guidance))
        self.sequence = int(side.get("max_sequence_length", self.default_sequence))
        if max_sequence_length is not None:
            self.sequence = max_sequence_length
        shortest = self._shortest_sequence()
        if not shortest <= self.sequence <= self.longest_sequence:
            raise ValueError(
                f"model.max_sequence_length={self.sequence} must be from {shortest} "
                f"to {self.longest_sequence}, the limit of {self.pipeline_class.__name__}"
            )
        self.batched_guidance = True
        """Whether both passes of classifier-free guidance run as one batch of twice the size."""
        self.parts = parts
        self.pipe = pipe = pipe or self._load(dtype, vae_dtype or dtype, base)
        if fp8 and parts != "text":
            keep_in_fp8(pipe.transformer, dtype, self.path)
        for name in self._networks():
            network = getattr(pipe, name).requires_grad_(False).eval()
            if name != "transformer" or base == "device":
                network.to(self.device)
        self.transformer: nn.Module = pipe.transformer
        self.vae = pipe.vae
        self.scheduler = pipe.scheduler

    def _part_configs(self, pipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The transformer's and the autoencoder's, without loading them."""
        if pipe is not None:
            return dict(pipe.transformer.config), dict(pipe.vae.config)
        return (
            part_config(self.path, "transformer", self.transformer_class),
            part_config(self.path, "vae", self.vae_class),
        )

    def _load(self, dtype: torch.dtype, vae_dtype: torch.dtype, base: Base) -> Any:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        pipe = load_pipeline(
            self.pipeline_class,
            self.path,
            transformer_class=self.transformer_class,
            encoders=self.text_encoders,
            parts=self.parts,
            dtype=dtype,
            vae_dtype=vae_dtype,
            empty=base == "empty",
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

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

    @abstractmethod
    def _to_vae(self, latents: Tensor) -> Tensor:
        """fp32 latents as the autoencoder's decoder takes them."""

    @abstractmethod
    def lora_targets(self) -> str | list[str]:
        """The modules that adapters go on by default (METHOD §6)."""

    def _networks(self) -> list[str]:
        """The pipeline's parts that have weights here."""
        text = [name for name in self.text_encoders if getattr(self.pipe, name) is not None]
        return text if self.parts == "text" else [*text, "transformer", "vae"]

    def _shortest_sequence(self) -> int:
        """The fewest text tokens: none at all is no length that a tokenizer cuts to."""
        return 1

    def _patch(self, transformer: Mapping[str, Any]) -> int:
        return 2

    def _default_latent(self, transformer: Mapping[str, Any]) -> int:
        """The side of the model's own resolution, in the autoencoder's cells."""
        return 128

    def _max_cells(self, transformer: Mapping[str, Any]) -> int | None:
        """The longest side in tokens that the transformer has positions for, if there is one."""
        return None

    def _latent_shape(self, channels: int) -> tuple[int, ...]:
        return (channels // self.packing, self.geometry.latent, self.geometry.latent)

    def _mu(self, steps: int) -> float:
        """The parameter of a resolution-dependent shift, by the pipeline's own formula."""
        config = self.scheduler.config
        return calculate_shift(
            self.geometry.tokens,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )

    # ---- the protocol

    @property
    def student_base(self) -> nn.Module:
        return self.transformer

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
        None."""
        if guidance is None or guidance == 1.0:
            return self._forward(network, x, sigma, cond.positive)
        if self.batched_guidance:
            both = {
                key: torch.cat([cond.negative[key], cond.positive[key]]) for key in cond.positive
            }
            passes = self._forward(network, torch.cat([x, x]), torch.cat([sigma, sigma]), both)
            plain, conditional = passes.chunk(2)
        else:
            conditional = self._forward(network, x, sigma, cond.positive)
            plain = self._forward(network, x, sigma, cond.negative)
        return plain + guidance * (conditional - plain)

    def passes(self, guidance: float) -> int:
        """How many passes of the network one velocity with `guidance` takes."""
        return 1 if guidance == 1.0 else 2

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts' conditioning; the negative is the empty prompt.

        Raises:
            RuntimeError: after `free_text_encoders`, or where they were not loaded.
        """
        if self.pipe.text_encoder is None:
            raise RuntimeError("the text encoders were freed: encode every prompt before training")
        # All rows of the negative are alike, so it is encoded once and not once a prompt.
        negative = {
            key: value.expand(len(prompts), *value.shape[1:])
            for key, value in self._encode([""]).items()
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

    def fuse(self) -> int:
        """For training in 16 bits, before adapters go on: makes the transformer's blocks into ones
        that take fewer passes, where the family has them; how many there were."""
        return 0

    def few_step_sigmas(self, steps: int) -> Tensor:
        """Equal raw levels 1, ..., 1/K through the pipeline's own scheduler, then 0 (METHOD §1)."""
        return self._schedule(steps, raw=True)

    def teacher_sigmas(self, steps: int) -> Tensor:
        """The grid of the pipeline's own call with this number of steps."""
        return self._schedule(steps, raw=True)

    def _schedule(self, steps: int, raw: bool) -> Tensor:
        levels = raw_levels(steps)
        dynamic = self.scheduler.config.use_dynamic_shifting
        shift: dict[str, Any] = {"mu": self._mu(steps)} if dynamic else {}
        if raw:
            shift["sigmas"] = levels
        with np.errstate(all="ignore"):  # what comes of it is looked at
            self.scheduler.set_timesteps(steps, device="cpu", **shift)
        levels = self.scheduler.sigmas.clone()
        self._check_grid(levels)
        return levels

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
        for name in self.text_encoders:
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

    def _check_grid(self, levels: Tensor) -> None:
        """Whether noise levels fall from at most 1 to 0: a NaN does neither."""
        if bool((levels[:-1] > levels[1:]).all()) and levels[0] <= 1 and levels[-1] == 0:
            return
        given = {k: v for k, v in self.scheduler.config.items() if k in LEVEL_KEYS and v}
        raise ValueError(
            f"the scheduler in {self.path} makes of {len(levels) - 1} steps the levels "
            f"{', '.join(f'{level:.3g}' for level in levels[:4].tolist())}, …, which do not fall "
            f"from 1 to 0: see {', '.join(f'{k}={v}' for k, v in given.items())} in its "
            "scheduler_config.json"
        )

    def _geometry(
        self, transformer: Mapping[str, Any], vae: Mapping[str, Any], resolution: int | None
    ) -> Geometry:
        channels, latent = transformer["in_channels"], vae["latent_channels"]
        if channels != self.packing * latent:
            raise ValueError(
                f"the transformer in {self.path} takes {channels} channels but the autoencoder "
                f"makes {self.packing * latent} a token: these are not parts of one model"
            )
        if "shift_factor" in vae and vae["shift_factor"] is None:
            raise ValueError(f"the autoencoder in {self.path} has no shift_factor, which it needs")
        axes, each = transformer.get("axes_dims_rope"), transformer.get("attention_head_dim")
        if axes is not None and (sum(axes) != each or len(axes) != self.axes or _odd(axes)):
            raise ValueError(
                f"the transformer in {self.path} has axes_dims_rope={axes}, which are not "
                f"{self.axes} even numbers that add up to its attention_head_dim={each}"
            )
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        patch = self._patch(transformer)
        side = self._default_latent(transformer) * factor if resolution is None else resolution
        cells = self._max_cells(transformer)
        most = "" if cells is None else f" and at most {cells * factor * patch}"
        too_large = cells is not None and side > cells * factor * patch
        if side < 1 or side % (factor * patch) or too_large:
            raise ValueError(
                f"model.resolution={side} must be a positive multiple of {factor * patch}{most} "
                f"for the model in {self.path}"
            )
        return Geometry(side, factor, patch)


def _odd(numbers: Sequence[int]) -> bool:
    return any(number % 2 for number in numbers)


def part_config(path: str | Path, part: str, model: Any) -> dict[str, Any]:
    """A part's configuration without loading it: its config.json over its class's defaults."""
    parameters = inspect.signature(model.__init__).parameters.items()
    saved = read_json(Path(path) / part / "config.json")
    return {**{name: p.default for name, p in parameters}, **saved}

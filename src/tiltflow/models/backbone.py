"""What a model family has to offer: the protocol behind which every network is a velocity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from tiltflow.core.sizes import Resolution
from tiltflow.models.medium import Medium

Parts = Literal["all", "text", "image"]
"""What of a pipeline is loaded: everything, what encodes prompts, or everything else."""
Base = Literal["device", "host", "empty"]
"""Where the frozen transformer is put: on the device; in main memory, to be sharded from there; or
there without values, which another rank has (`distributed.shard`)."""


@dataclass(frozen=True)
class Loading:
    """How a pipeline is loaded.

    `dtype` is the frozen weights' (velocities and images are fp32 all the same), `vae_dtype` the
    autoencoder's, by default `dtype`. `resolution` is the image's side in pixels, or its height and
    width; None is the model's own. `max_sequence_length` are text tokens (of the longest encoder);
    None is the side file's value, else the pipeline's own default. `fp8` keeps the transformer's
    matrices in 8 bits (`keep_in_fp8`). `size_name` is what stands before a resolution in an error.
    """

    device: torch.device | str
    dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype | None = None
    resolution: Resolution | None = None
    max_sequence_length: int | None = None
    parts: Parts = "all"
    fp8: bool = False
    base: Base = "device"
    size_name: str = "model.resolution="


ON_HOST = "_lengths"
"""How the keys of a conditioning end whose tensors stay in main memory: what the host reads in each
pass, for which it should not wait for a device."""


@dataclass(frozen=True)
class Conditioning:
    """What a batch of prompts says to a network.

    `positive` and `negative` hold the same keys; each tensor has the batch along its first
    dimension. `negative` is the empty (or negative) prompt, for classifier-free guidance.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Conditioning:
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Conditioning:
        def moved(side: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: t if k.endswith(ON_HOST) else t.to(device) for k, t in side.items()}

        return Conditioning(moved(self.positive), moved(self.negative))

    def repeat(self, times: int) -> Conditioning:
        """Each row `times` times in succession: a prompt's group."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, 0))

    def tile(self, times: int) -> Conditioning:
        """The whole batch `times` times: several noisy copies of the same prompts."""
        return self._map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def _map(self, function) -> Conditioning:  # type: ignore[no-untyped-def]
        return Conditioning(
            {key: function(value) for key, value in self.positive.items()},
            {key: function(value) for key, value in self.negative.items()},
        )


@dataclass(frozen=True)
class Grouped:
    """A conditioning of which each row stands `times` times in succession.

    Of these it has `size` from number `begin` on (None: all that follow), because a rank's part
    may begin and end inside a group. Rows are repeated when they are asked for: a rollout of 1,536
    samples has 64 prompts, and the embeddings of all 1,536 would take tens of gigabytes.
    """

    each: Conditioning
    times: int
    begin: int = 0
    size: int | None = None

    def __len__(self) -> int:
        whole = len(self.each) * self.times - self.begin
        return whole if self.size is None else self.size

    def __getitem__(self, rows: slice) -> Conditioning:
        start, stop, _ = rows.indices(len(self))
        start, stop = self.begin + start, self.begin + stop
        first = start // self.times
        part = self.each[first : -(-stop // self.times)].repeat(self.times)
        return part[start - first * self.times : stop - first * self.times]


class Backbone(Protocol):
    """A model family, without its trained weights: those come as `network` in each call.

    Everything particular to a family (packing, position ids, timestep scale, latent scaling,
    shift) is behind these methods and nowhere else.
    """

    family: str
    device: torch.device
    latent_shape: tuple[int, ...]
    medium: Medium
    """What its samples are; `decode` gives these."""
    guidance: float
    """The teacher's guidance scale unless the recipe says otherwise."""

    @property
    def student_base(self) -> nn.Module:
        """The network that generator adapters sit on; frozen."""

    @property
    def teacher_base(self) -> nn.Module:
        """The network of the teacher and of the fake score; frozen. Often the same object."""

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        guidance: float | None,
    ) -> Tensor:
        """v(x, σ) in fp32, shape of `x`; `sigma` (B,) in [0, 1]; guidance 1.0 is one pass.

        None is the network's own: one pass, and where the scale is an input, the pipeline's.
        """

    def passes(self, guidance: float) -> int:
        """How many passes of the network one `velocity` with this guidance takes (for NFE)."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts' conditioning, on `device`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Samples of `medium` from latents, differentiable, fp32: images (B, 3, H, W) in [0, 1]."""

    def few_step_sigmas(self, steps: int) -> Tensor:
        """The (steps + 1,) fp32 grid of METHOD §1: σ₀ > … > σ_K = 0, on the CPU."""

    def teacher_sigmas(self, steps: int) -> Tensor:
        """The (steps + 1,) fp32 grid that the model's own pipeline uses, on the CPU."""

    def lora_targets(self) -> str | list[str]:
        """The modules that adapters go on by default (METHOD §6)."""

    def new_copy(self, of: str, seed: int) -> nn.Module:
        """A separate trainable network in fp32; `of` is "student" or "teacher"."""

    def free_text_encoders(self) -> None:
        """Drops what only `encode` needs."""


def check_guidance(backbone: Backbone, guidance: float | None, name: str) -> None:
    """Passes a teacher that is not led away from its prompts; `guidance` None is the model's own.

    Pipelines count from 0, or take every scale up to 1 for none: 0 is what one who means none
    writes, and as p = u + g (c - u) it is the velocity of the empty prompt.

    Raises:
        ValueError: if the scale is below 1 where it takes a second pass; `name` is whose it is.
    """
    scale = backbone.guidance if guidance is None else guidance
    if scale < 1 and backbone.passes(scale) > 1:
        raise ValueError(
            f"{name} {scale:g} is below 1, so that the teacher of {backbone.family} would follow "
            "its prompts less than without guidance, and at 0 not at all: 1 is without guidance"
        )

"""The sizes of an image, and the noise levels that a scheduler makes of a number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tiltflow.core.sentences import counted
from tiltflow.core.sizes import Resolution, both, frames_of, plain, said

LEVEL_KEYS = (
    "shift", "shift_terminal", "invert_sigmas", "use_dynamic_shifting", "base_shift", "max_shift",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
)  # fmt: skip
"""Of a scheduler's configuration: what the levels depend on."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of an image: `height` × `width` pixels, `factor` pixels a latent cell, `patch` cells a
    token. A video has `frames` of them, `step` to a latent frame after the first; `step` is None
    where the model makes pictures alone."""

    height: int
    width: int
    factor: int
    patch: int
    frames: int = 1
    step: int | None = None

    @property
    def resolution(self) -> Resolution:
        """As a config has it."""
        return plain(self.frames, self.height, self.width)

    @property
    def latent_frames(self) -> int:
        """Of a video; 1 of an image."""
        return (self.frames - 1) // (self.step or 1) + 1

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width in cells of the autoencoder's latent."""
        return self.height // self.factor, self.width // self.factor

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width in tokens."""
        cells = self.factor * self.patch
        return self.height // cells, self.width // cells

    @property
    def tokens(self) -> int:
        """The length of the image's or video's token sequence."""
        return self.latent_frames * math.prod(self.grid)


def geometry_of(
    resolution: Resolution,
    factor: int,
    patch: int,
    most: int | None,
    where: str,
    what: str = "model.resolution=",
    step: int | None = None,
) -> Geometry:
    """The geometry of pictures of `resolution`; `most` tokens a side, if there is a bound;
    `what` is its name in an error. `step` frames of a video make a latent one after the first;
    None where the model makes pictures alone.

    Raises:
        ValueError: if a side is no positive multiple of a token's, or too long, or there are
            frames where there can be none, too many, or not one more than a multiple of `step`.
    """
    frames = frames_of(resolution)
    if frames != 1 and step is None:
        raise ValueError(
            f"{what}{said(resolution)} is of a video, and the model in {where} makes pictures"
        )
    if (frames - 1) % (step or 1):
        raise ValueError(
            f"{what}{said(resolution)} has {frames} frames, but they must be one more than a "
            f"multiple of {step} for the model in {where}"
        )
    if most is not None and (frames - 1) // (step or 1) >= most:
        raise ValueError(
            f"{what}{said(resolution)} has {frames} frames, and the model in {where} has positions "
            f"for {(most - 1) * (step or 1) + 1}"
        )
    token = factor * patch
    for side in both(resolution):
        if side < 1 or side % token or (most is not None and side > most * token):
            each = "in both sides " if isinstance(resolution, tuple) else ""
            bound = "" if most is None else f" and at most {most * token}"
            raise ValueError(
                f"{what}{said(resolution)} must be {each}a positive multiple of "
                f"{token}{bound} for the model in {where}"
            )
    return Geometry(*both(resolution), factor, patch, frames, step)


def odd(numbers: Sequence[int]) -> bool:
    """Whether one of them is odd."""
    return any(number % 2 for number in numbers)


def check_axes(transformer: Mapping[str, Any], count: int, where: str) -> None:
    """Whether the parts of a position, where a transformer has them, are `count` and fill a head.

    Raises:
        ValueError: if they do not.
    """
    axes, each = transformer.get("axes_dims_rope"), transformer.get("attention_head_dim")
    if axes is not None and (sum(axes) != each or len(axes) != count or odd(axes)):
        raise ValueError(
            f"the transformer in {where} has axes_dims_rope={axes}, which are not "
            f"{count} even numbers that add up to its attention_head_dim={each}"
        )


def shift_of(config: Mapping[str, Any], tokens: int, where: str) -> float:
    """The parameter of a shift by resolution, at so many tokens on a scheduler's line; `where` is
    the pipeline's directory.

    Raises:
        ValueError: if its configuration lacks an end of the line.
    """
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    ends: list[Any] = [config.get(key) for key in keys]  # DPM-Solver has none
    if None in ends:
        raise ValueError(
            f"the scheduler in {where} has use_dynamic_shifting=true, but {keys[ends.index(None)]} "
            "is null in its scheduler_config.json"
        )
    # a whole pipeline with its text encoders, which runs of other families need not wait for
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return float(calculate_shift(tokens, *ends))


def grid(
    scheduler: Any, steps: int, raw: list[float] | None, mu: float | None, where: str
) -> Tensor:
    """The (steps + 1,) fp32 levels of a scheduler, on the CPU: of the levels `raw`, or of its own.
    `mu` is for a shift by resolution, `where` the pipeline's directory.

    Raises:
        ValueError: if they do not fall from at most 1 to 0.
    """
    shift: dict[str, Any] = {} if mu is None else {"mu": mu}
    if raw is not None:
        shift["sigmas"] = raw
    with np.errstate(all="ignore"):  # what comes of it is looked at
        scheduler.set_timesteps(steps, device="cpu", **shift)
    made: Tensor = scheduler.sigmas.clone()
    _check(scheduler, made, where)
    return made


def _check(scheduler: Any, levels: Tensor, where: str) -> None:
    """Whether noise levels fall from at most 1 to 0: a NaN does neither."""
    if bool((levels[:-1] > levels[1:]).all()) and levels[0] <= 1 and levels[-1] == 0:
        return
    given = {k: v for k, v in scheduler.config.items() if k in LEVEL_KEYS and v}
    raise ValueError(
        f"the scheduler in {where} makes of {counted(len(levels) - 1, 'step')} the levels "
        f"{', '.join(f'{level:.3g}' for level in levels[:4].tolist())}, …, which do not fall "
        f"from 1 to 0: see {', '.join(f'{k}={v}' for k, v in given.items())} in its "
        "scheduler_config.json"
    )

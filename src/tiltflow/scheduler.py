"""The students' sampler as a diffusers scheduler: `pipe(...)` gives what `tiltflow sample` gives.

All that inference needs of this package: it imports the leaves `flow` and `randomness` only.

    pipe.load_lora_weights("export/few_step")
    pipe.scheduler = CPSFlowMatchScheduler.from_pretrained("export/scheduler")
    images = pipe(prompt=prompts, num_inference_steps=4, guidance_scale=1.0,
                  generator=pipe.scheduler.seed(0, images=len(prompts))).images
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from tiltflow.core.randomness import SAMPLE_INIT, Randomness, sample_step
from tiltflow.flow import MOST_STEPS, cps_step, raw_levels

# diffusers loads a part of a pipeline by a base class that it finds by name in the part's module
__all__ = ["CPSFlowMatchScheduler", "SchedulerMixin", "latent_shape", "pack"]

MOST_IMAGES = 10_000
"""Of one call."""

Draw = tuple[Randomness, int]
"""Where an image's noise comes from: a seed, and the image's number."""


class CPSFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """Coefficients-Preserving Sampling (METHOD §2) on the few-step grid of METHOD §1.

    The grid is the equal raw levels 1, …, 1/K through the parent's own shift, static or dynamic,
    and then 0, whatever the pipeline would ask of it otherwise: 1, .9, .75, .5, 0 for SD3. Make
    one from a pipeline's own scheduler: `from_config(pipe.scheduler.config, eta=0.9)`.

    **Noise.** Most pipelines hand `step` no generator, so the draws of the stochastic steps are
    counted (`tiltflow.core.randomness`): after `seed` they are those of `tiltflow sample --seed`.
    A call that was not seeded takes each image's seed from its own initial latent, so that the
    `generator` given to the pipeline decides the image all the same.

    Args:
        eta: stochasticity in [0, 1]; 0 is the ODE's Euler step, up to rounding.
        steps: how many steps the student was trained for, or the several that it may have, None if
            that is not known. A call with another number of them is warned of, and goes on.
        patch: for pipelines whose latents are token sequences (B, L, C): how many latent cells a
            token is wide, 2 for FLUX.1 and 1 for FLUX.2. Plain latents (B, C, H, W) ignore it.
        size: height and width, in any unit, of the pictures that the student was trained for,
            where they are not square: token sequences do not say their own. Of videos they stand
            behind the frames.
        num_train_timesteps: this and all that follow are the parent's.

    Raises:
        ValueError: if `eta`, `patch` or `size` is out of range, or the parent's own stochastic
            sampling or inverted levels are asked for.
    """

    @register_to_config
    def __init__(
        self,
        eta: float = 0.9,
        patch: int = 1,
        steps: int | Sequence[int] | None = None,
        size: Sequence[int] | None = None,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it goes from 0 to 1")
        if patch < 1:
            raise ValueError(f"patch is {patch}; it is 1 or more")
        if not all(1 <= each <= MOST_STEPS for each in _trained(steps)):
            raise ValueError(f"steps is {steps}; it goes from 1 to {MOST_STEPS}")
        _check_size(size)
        if invert_sigmas or stochastic_sampling:
            raise ValueError("CPS has no inverted levels, and eta in place of stochastic_sampling")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        self._size: Sequence[int] | None = None
        self._next: list[Draw] | None = None
        self._draws: list[Draw] | None = None

    def seed(
        self, seed: int, images: int | Sequence[int] = 1, size: Sequence[int] | None = None
    ) -> list[torch.Generator]:
        """Seeds the next call of the pipeline, and only that; returns its `generator` argument.

        Args:
            seed: as in `tiltflow sample --seed`.
            images: how many images the call makes, or the images' numbers, which are their
                places in `tiltflow sample --prompts`.
            size: height and width of this call's pictures, where they are not the trained ones.

        Raises:
            ValueError: on a negative seed or number, no image, or more than `MOST_IMAGES`.
        """
        if isinstance(images, int) and images > MOST_IMAGES:
            raise ValueError(f"seed was asked for {images} images; {MOST_IMAGES} is the most")
        numbers = list(range(images)) if isinstance(images, int) else list(images)
        if not numbers:
            raise ValueError("seed was asked for no image")
        randomness = Randomness(seed)
        _check_size(size)
        self._size = size
        self._next = [(randomness, n) for n in numbers]
        return [randomness.generator(SAMPLE_INIT, n) for n in numbers]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """The parent's, on `sigmas` as the raw levels; by default METHOD §1's.

        Raises:
            ValueError: on `timesteps`, which do not say where the levels are.
        """
        if timesteps is not None:
            raise ValueError("the CPS scheduler takes sigmas or a number of steps, not timesteps")
        if sigmas is None:
            if num_inference_steps is None:
                raise ValueError("give num_inference_steps, or sigmas")
            sigmas = raw_levels(num_inference_steps)
        trained = _trained(self.config.steps)
        if trained and len(sigmas) not in trained:
            warnings.warn(
                f"the student was trained for {' or '.join(map(str, trained))} steps, not for "
                f"{len(sigmas)}: give num_inference_steps={trained[-1]}",
                stacklevel=2,
            )
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu)
        if self._next is None:
            self._size = None
        self._draws, self._next = self._next, None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One CPS step, in fp32, returned in `model_output`'s precision.

        Raises:
            ValueError: if the call makes another number of images than it was seeded for.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        k: int = self.step_index
        if self._draws is None:
            self._draws = [(Randomness(_fingerprint(row)), 0) for row in sample]
        if len(self._draws) != len(sample):
            raise ValueError(
                f"the scheduler was seeded for {len(self._draws)} images, "
                f"but the pipeline makes {len(sample)}"
            )
        sigma, sigma_next = self.sigmas[k], self.sigmas[k + 1]
        stochastic = self.config.eta > 0 and bool(sigma_next > 0)
        noise = self._noise(k, sample).to(sample.device) if stochastic else None
        x = cps_step(sample.float(), model_output, sigma, sigma_next, self.config.eta, noise)
        self._step_index += 1
        x = x.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _noise(self, k: int, sample: Tensor) -> Tensor:
        """Step k's z in `sample`'s layout, on the CPU."""
        assert self._draws is not None
        shape, tokens = tuple(sample.shape[1:]), sample.ndim == 3
        if tokens:
            size = self._size or self.config.size
            shape = latent_shape(shape[0], shape[1], self.config.patch, size)
        z = torch.stack([r.normal(sample_step(k), n, shape) for r, n in self._draws])
        return pack(z, self.config.patch) if tokens else z

    def scale_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not offered: a student starts from noise, not from an image."""
        raise NotImplementedError("a few-step student is sampled from noise, not from an image")


def latent_shape(
    length: int, channels: int, patch: int, size: Sequence[int] | None = None
) -> tuple[int, int, int]:
    """The (C, H, W) latent behind a sequence of `length` tokens of `channels` channels.

    One of the proportions of `size`, if the tokens fill it; else a square one where `length` is a
    square, as `tiltflow sample` makes them; else one row of tokens, which is as good a place for
    independent draws.
    """
    side = math.isqrt(length)
    height, width = (side, side) if side**2 == length else (1, length)
    if size is not None:
        high, wide = size[-2:]
        rows = max(1, math.isqrt(length * high // wide))
        columns = length // rows
        if rows * columns == length and rows * wide == columns * high:
            height, width = rows, columns
    return channels // patch**2, height * patch, width * patch


def _trained(steps: int | Sequence[int] | None) -> Sequence[int]:
    """The numbers of steps that a student was trained for."""
    if steps is None:
        return ()
    return (steps,) if isinstance(steps, int) else steps


def _check_size(size: Sequence[int] | None) -> None:
    if size is not None and (len(size) not in (2, 3) or min(size) < 1):
        raise ValueError(
            f"size is {size}; it is a height and a width, behind the frames if there are any"
        )


def pack(latent: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) as the tokens (B, L, C · patch²) that FLUX.1 (2) and FLUX.2 (1) make of it."""
    return F.pixel_unshuffle(latent, patch).flatten(2).transpose(1, 2)


def _fingerprint(latent: Tensor) -> int:
    """63 bits of an image's initial latent."""
    content = latent.detach().float().cpu().contiguous().numpy()
    digest = hashlib.blake2b(np.ascontiguousarray(content).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

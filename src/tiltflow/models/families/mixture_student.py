"""The student network of a Gaussian mixture: an MLP fitted to the closed-form velocity.

A fit takes seconds, and every process of a run, a study or a resume begins with the same one: it is
kept in the user's cache, by everything that its bits depend on.
"""

from __future__ import annotations

import hashlib
import math
import os
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tiltflow.core.disk import save_tensors
from tiltflow.core.paths import user_cache
from tiltflow.flow import broadcast, interpolate, shift_sigma

if TYPE_CHECKING:
    from tiltflow.models.families.mixture import GaussianMixture

FIT_STEPS, FIT_BATCH, FIT_LR = 1500, 256, 1e-2
FITTED = "1"
"""Another number for another fit: with it, what was kept of the last one is not looked at."""


class StudentNetwork(nn.Module):
    """An MLP of `x` (B, D) and Fourier features of σ (B,) that predicts the velocity (B, D).

    With S = (1−σ)² scale² + σ², the MLP F sees x/√S and v = (σ − (1−σ) scale²)/S · x +
    scale/√S · F: the first term is the exact velocity of N(0, scale² I) data, the second factor
    the std of ε − x₀ given x_σ for it. So what F takes and gives is of order one at every σ.
    """

    def __init__(
        self,
        dimensions: int,
        scale: float,
        seed: int,
        width: int = 128,
        depth: int = 3,
        frequencies: int = 8,
    ) -> None:
        super().__init__()
        self.dimensions, self.scale, self.frequencies = dimensions, scale, frequencies
        widths = [dimensions + 1 + 2 * frequencies] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.out = nn.Linear(width, dimensions)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """He-normal weights from `seed` alone, whatever the global generator's state."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _features(self, level: Tensor) -> Tensor:
        """σ and its sines and cosines at 1/4, 2/4, ... of a cycle: (B, 1 + 2 · frequencies)."""
        counts = torch.arange(1, self.frequencies + 1, device=level.device, dtype=level.dtype)
        phase = level * counts * (math.pi / 2)
        return torch.cat([level, phase.sin(), phase.cos()], dim=1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = broadcast(sigma, x).expand(x.shape[0], 1)
        variance = ((1 - level) * self.scale) ** 2 + level**2
        root = variance.sqrt()
        h = torch.cat([x / root, self._features(level)], dim=1)
        for layer in self.hidden:
            h = nn.functional.silu(layer(h))
        slope = (level - (1 - level) * self.scale**2) / variance
        return slope * x + self.scale / root * self.out(h)


def fitted_student(mixture: GaussianMixture, seed: int, steps: int, shift: float) -> StudentNetwork:
    """The student fitted in `steps` to the velocity of a mixture on the CPU, so alike on any
    device: half of the levels uniform in σ, half shifted towards noise by `shift`.

    It is read from the user's cache where a process on a machine like this one has left it, and
    left there; a file that cannot be read is made anew, and where none can be written none is.
    """
    network = StudentNetwork(mixture.dimensions, mixture.rms(), seed)
    if not steps:  # a stand-in whose passes are counted: there is nothing to keep
        return network
    kept = _place(mixture, network, seed, steps, shift)
    try:
        network.load_state_dict(load_file(kept))
    except (OSError, SafetensorError, RuntimeError):
        _fit(network, mixture, seed, steps, shift)
        _keep(network, kept)
    return network


def _place(
    mixture: GaussianMixture, network: StudentNetwork, seed: int, steps: int, shift: float
) -> Path:
    """Where this fit is kept: sums of floats differ between versions, kinds of CPU and numbers of
    threads."""
    target = [mixture.means.tolist(), mixture.std.tolist(), mixture.weights.tolist(), shift]
    fit = [seed, steps, FIT_BATCH, FIT_LR, str(network)]
    sums = [torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    name = hashlib.sha256(repr([FITTED, target, fit, sums]).encode()).hexdigest()
    return user_cache() / "mixture" / f"{name[:32]}.safetensors"


def _keep(network: StudentNetwork, place: Path) -> None:
    """Whole or not at all, whatever other processes do at once."""
    made = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(network.state_dict(), made)
        made.replace(place)
    except OSError:  # a home that is full or may not be written to: the next process fits again
        with suppress(OSError):
            made.unlink()


def _fit(
    network: StudentNetwork, mixture: GaussianMixture, seed: int, steps: int, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(network.parameters(), lr=FIT_LR, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, FIT_LR, max(steps, 2), pct_start=0.05)
    with torch.enable_grad():
        for _ in range(steps):
            x0 = mixture.sample(FIT_BATCH, generator)
            noise = torch.randn(x0.shape, generator=generator)
            u = torch.rand(FIT_BATCH, generator=generator)
            even = torch.arange(FIT_BATCH) % 2 == 0
            sigma = torch.where(even, u, shift_sigma(u, shift))
            x = interpolate(x0, noise, sigma)
            # The same weight that makes the inner MLP's target of order one.
            level = sigma[:, None]
            weight = ((1 - level) * network.scale) ** 2 + level**2
            error = network(x, sigma) - mixture.velocity(x, sigma)
            adam.zero_grad()
            (weight * error**2).mean().backward()
            adam.step()
            schedule.step()

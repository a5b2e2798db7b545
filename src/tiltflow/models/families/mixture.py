"""A Gaussian mixture in closed form as a backbone: both stages run on it in seconds.

The teacher's velocity, the noised density and the reward-tilted target (METHOD §3) are exact, so
what a run should reach is known. The student is a small MLP fitted to the closed-form velocity.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence

import scipy
import torch
from torch import Tensor, nn

from tiltflow.flow import broadcast, raw_levels, shift_sigma
from tiltflow.models.backbone import Conditioning
from tiltflow.models.families.mixture_student import FIT_STEPS, StudentNetwork, fitted_student
from tiltflow.models.medium import POINTS, Medium

SHIFT = 3.0


class GaussianMixture:
    """Isotropic Gaussians: `means` (M, D), `std` (M,) > 0 or one float, `weights` (M,) > 0.

    Weights are normalised to sum to 1. Results have the precision of the points they are asked
    about (fp32 or fp64) and are differentiable in them.

    Raises:
        ValueError: if shapes disagree, or a std or a weight is not positive and finite.
    """

    def __init__(self, means: Tensor, std: Tensor | float, weights: Tensor) -> None:
        if means.ndim != 2:
            raise ValueError(f"means must be (modes, dimensions), got {tuple(means.shape)}")
        modes = means.shape[0]
        std = torch.as_tensor(std).to(means)
        std = std.expand(modes).clone() if std.ndim == 0 else std
        weights = weights.to(means)
        for name, value in (("std", std), ("weights", weights)):
            if value.shape != (modes,):
                raise ValueError(f"{name} of shape {tuple(value.shape)} for {modes} modes")
            if not bool((torch.isfinite(value) & (value > 0)).all()):
                raise ValueError(f"the mixture's {name} must all be positive and finite")
        self.means, self.std, self.weights = means, std, weights / weights.sum()

    @property
    def dimensions(self) -> int:
        return self.means.shape[1]

    def to(self, target: torch.device | torch.dtype) -> GaussianMixture:
        """The same mixture on another device or in another precision."""
        return GaussianMixture(self.means.to(target), self.std.to(target), self.weights.to(target))

    def rms(self) -> float:
        """sqrt(E‖x₀‖² / D), the scale of a coordinate."""
        second = (self.means**2).mean(1) + self.std**2
        return float((self.weights * second).sum().sqrt())

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` points (n, D), on the mixture's device; drawn on the generator's."""
        where = generator.device
        modes = torch.multinomial(self.weights.to(where), n, replacement=True, generator=generator)
        means = self.means.to(where)[modes]
        noise = torch.randn(means.shape, dtype=means.dtype, device=where, generator=generator)
        return (means + self.std.to(where)[modes, None] * noise).to(self.means.device)

    def _noised(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets (B, M, D), variances (B, M) and joint log-densities (B, M) at level σ.

        Given mode k, x_σ ~ N((1−σ) μ_k, S_k I) with S_k = (1−σ)² s_k² + σ², which never is 0.
        """
        level = broadcast(sigma, x)
        means, std, weights = self.means.to(x), self.std.to(x), self.weights.to(x)
        offset = x[:, None] - (1 - level)[:, None] * means
        variance = (((1 - level) * std) ** 2 + level**2).expand(x.shape[0], -1)
        exponent = -(offset**2).sum(-1) / (2 * variance)
        log_norm = 0.5 * self.dimensions * torch.log(2 * math.pi * variance)
        return offset, variance, weights.log() + exponent - log_norm

    def noised_log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p_σ(x) of x_σ = (1−σ) x₀ + σ ε: (B,) for `x` (B, D), σ (B,) in [0, 1]."""
        return torch.logsumexp(self._noised(x, sigma)[2], dim=1)

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x₀ = x): (B,)."""
        return self.noised_log_density(x, torch.zeros((), dtype=x.dtype, device=x.device))

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """v(x, σ) = E[ε − x₀ given x_σ = x] (METHOD §1): (B, D), finite on all of σ in [0, 1].

        Given mode k, ε − x₀ and x_σ are jointly Gaussian with covariance σ − (1−σ) s_k², so the
        mean is −μ_k + (σ − (1−σ) s_k²)/S_k · (x − (1−σ) μ_k); modes by their responsibilities.
        """
        offset, variance, joint = self._noised(x, sigma)
        level = broadcast(sigma, x)
        slope = (level - (1 - level) * self.std.to(x) ** 2) / variance
        by_mode = slope[..., None] * offset - self.means.to(x)
        return (torch.softmax(joint, dim=1)[..., None] * by_mode).sum(1)

    def tilted(self, direction: Tensor, beta: float) -> GaussianMixture:
        """The exact p̃ ∝ p exp(β r) for r(x) = direction · x, `direction` (D,) (METHOD §3).

        Weights ∝ w_k exp(β d·μ_k + β² s_k² ‖d‖²/2), means μ_k + β s_k² d, the same stds.
        """
        d = self._direction(direction)
        means = self.means + beta * self.std[:, None] ** 2 * d
        return GaussianMixture(means, self.std, self._tilted_log_weights(d, beta).exp())

    def _direction(self, direction: Tensor) -> Tensor:
        if direction.shape != (self.dimensions,):
            raise ValueError(f"a direction of {direction.numel()} numbers, not {self.dimensions}")
        return direction.to(self.means)

    def _tilted_log_weights(self, d: Tensor, beta: float) -> Tensor:
        exponent = beta * (self.means @ d) + 0.5 * beta**2 * self.std**2 * (d @ d)
        return torch.log_softmax(self.weights.log() + exponent, dim=0)

    def mode_masses(self, x: Tensor) -> Tensor:
        """The share of the points `x` (B, D) that each mode is most responsible for: (M,)."""
        joint = self._noised(x, torch.zeros((), dtype=x.dtype, device=x.device))[2]
        counts = torch.bincount(joint.argmax(1), minlength=self.means.shape[0])
        return counts.to(self.means) / x.shape[0]

    def share_within(self, x: Tensor, k: float = 3.0) -> float:
        """The share of the points `x` (B, D) within `k` std of some mode, in [0, 1]."""
        distance = torch.linalg.vector_norm(x[:, None] - self.means.to(x), dim=-1)
        return float((distance <= k * self.std.to(x)).any(1).double().mean())


def ring(modes: int = 8, radius: float = 1.5, std: float = 0.15) -> GaussianMixture:
    """Equal Gaussians on a circle in the plane, the first mode at (radius, 0); fp32."""
    angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture(means.float(), std, torch.ones(modes))


def fit_tilt(x: Tensor, mixture: GaussianMixture, direction: Tensor) -> tuple[float, float]:
    """(β, KL) of the tilted mixture whose mode masses are nearest, for r(x) = direction · x.

    `x` is samples (N, D) or mode masses (M,). β minimises KL(masses ‖ weights of the mixture
    tilted by β), in nats (METHOD §3); it is sought where the tilt changes the ratio of two modes'
    weights by at most e^50, and an answer at that edge means that the masses fit no finite β.

    Raises:
        ValueError: for masses that are no distribution over the modes, or a direction along which
            all modes have the same mean.
    """
    exact = mixture.to(torch.float64)
    d = exact._direction(direction)
    masses = exact.mode_masses(x.double()) if x.ndim == 2 else x.to(exact.means)
    if masses.shape != exact.weights.shape or bool((masses < 0).any()):
        raise ValueError(f"masses must be {exact.weights.shape[0]} numbers that are not negative")
    if not abs(float(masses.sum()) - 1) < 1e-4:
        raise ValueError(f"masses must sum to 1, not to {float(masses.sum()):.4g}")
    masses = masses / masses.sum()
    heights = exact.means @ d
    spread = float(heights.max() - heights.min())
    if not spread > 0:
        raise ValueError("all modes have the same reward, so that no tilt can be fitted")

    def divergence(beta: float) -> float:
        log_weights = exact._tilted_log_weights(d, beta)
        return float((torch.xlogy(masses, masses) - masses * log_weights).sum())

    edge = 50 / spread
    fit = scipy.optimize.minimize_scalar(
        divergence, bounds=(-edge, edge), method="bounded", options={"xatol": 1e-7}
    )
    return float(fit.x), max(float(fit.fun), 0.0)  # a KL of 0 comes out as -1e-17 after rounding


def sliced_wasserstein(
    a: Tensor, b: Tensor, projections: int = 64, *, generator: torch.Generator
) -> float:
    """Mean over random directions of the W1 distance between the projections of `a` and `b`.

    `a` and `b` are samples (N, D) of equal size, in the data's units; directions are uniform.

    Raises:
        ValueError: if the two samples differ in shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"samples of shapes {tuple(a.shape)} and {tuple(b.shape)} must be equal")
    directions = torch.randn(
        a.shape[1], projections, dtype=a.dtype, device=generator.device, generator=generator
    ).to(a.device)
    directions = directions / torch.linalg.vector_norm(directions, dim=0)
    gap = (a @ directions).sort(0).values - (b.to(a) @ directions).sort(0).values
    return float(gap.abs().mean())


class TeacherNetwork(nn.Module):
    """The mixture's exact velocity as a network without trainable parameters."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.mixture.velocity(x, sigma)


@functools.lru_cache(maxsize=16)
def _student(
    means: tuple[tuple[float, ...], ...],
    std: tuple[float, ...],
    weights: tuple[float, ...],
    seed: int,
    steps: int,
) -> StudentNetwork:
    """Kept for the life of the process: do not change the returned network, copy it."""
    mixture = GaussianMixture(torch.tensor(means), torch.tensor(std), torch.tensor(weights))
    return fitted_student(mixture, seed, steps, SHIFT)


class MixtureBackbone:
    """The `Backbone` of a Gaussian mixture: latents are the points, and samples too.

    It has no prompts (every one conditions on nothing) and no guidance; generator and fake score
    are separate networks that start from an MLP fitted to the teacher, not adapters. A student
    is fitted once a seed and machine, in about three seconds on one core, and kept.
    """

    family, guidance = "mixture", 1.0

    def __init__(
        self,
        mixture: GaussianMixture | None = None,
        device: torch.device | str = "cpu",
        fit_steps: int = FIT_STEPS,
    ) -> None:
        self.device = torch.device(device)
        self.mixture = (ring() if mixture is None else mixture).to(torch.float32).to(self.device)
        self.latent_shape: tuple[int, ...] = (self.mixture.dimensions,)
        self.medium: Medium = POINTS
        self.fit_steps = fit_steps
        self.teacher_network = TeacherNetwork(self.mixture)

    @property
    def teacher_base(self) -> nn.Module:
        """The exact velocity; nothing in it can be trained."""
        return self.teacher_network

    @functools.cached_property
    def student_base(self) -> nn.Module:
        """The fitted student of seed 0, frozen."""
        return self.new_student(0).requires_grad_(False)

    def new_student(self, seed: int) -> nn.Module:
        """A fresh trainable copy of the MLP fitted with `seed` to the teacher, on `device`."""
        on_cpu = self.mixture.to(torch.device("cpu"))
        means = tuple(tuple(row) for row in on_cpu.means.tolist())
        std, weights = tuple(on_cpu.std.tolist()), tuple(on_cpu.weights.tolist())
        fitted = _student(means, std, weights, seed, self.fit_steps)
        return copy.deepcopy(fitted).to(self.device)

    def new_copy(self, of: str, seed: int) -> nn.Module:
        """A trainable network; both bases begin as the fitted student (METHOD §4, schedule).

        Raises:
            ValueError: if `of` is neither "student" nor "teacher".
        """
        if of not in ("student", "teacher"):
            raise ValueError(f"a copy is of 'student' or 'teacher', not of {of!r}")
        return self.new_student(seed)

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """v(x, σ) in fp32 (fp64 for an fp64 teacher's `x`): (B, D), σ (B,) in [0, 1].

        Raises:
            ValueError: if `guidance` is not 1, or `x` is not a whole number of `cond`'s batches.
        """
        if guidance not in (None, 1.0):
            raise ValueError(
                f"the mixture has no prompts to guide by, so guidance must be 1, not {guidance}"
            )
        if len(cond) == 0 or x.shape[0] % len(cond):
            raise ValueError(f"conditioning of {len(cond)} prompts for {x.shape[0]} latents")
        return network(x if x.dtype == torch.float64 else x.float(), sigma)

    def passes(self, guidance: float) -> int:
        """One: there is no guidance."""
        return 1

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """As many rows as prompts, of nothing: tensors (B, 0)."""
        empty = torch.zeros(len(prompts), 0, device=self.device)
        return Conditioning({"prompt": empty}, {"prompt": empty})

    def decode(self, latents: Tensor) -> Tensor:
        """What the medium makes of the points: themselves, (B, D), which rewards read."""
        return self.medium.decode(latents)

    def few_step_sigmas(self, steps: int) -> Tensor:
        """Equal raw levels through the shift of 3: 1, .9, .75, .5, 0 for 4 steps (METHOD §1)."""
        return shift_sigma(torch.tensor([*raw_levels(steps), 0.0]), SHIFT)

    def teacher_sigmas(self, steps: int) -> Tensor:
        """The same grid as the few-step one, for any number of steps."""
        return self.few_step_sigmas(steps)

    def lora_targets(self) -> str | list[str]:
        """Raises ValueError: the student is trained in full."""
        raise ValueError("the mixture's student has no adapters: train it in full")

    def free_text_encoders(self) -> None:
        """There are none."""

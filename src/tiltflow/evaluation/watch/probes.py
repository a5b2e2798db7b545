"""What the watch measures: fixed prompts, fixed noise, and the quantities of one measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tiltflow.core.distributed import ALONE, Ranks
from tiltflow.core.errors import NonFiniteError
from tiltflow.core.randomness import Randomness
from tiltflow.data.embeddings import EncodedPrompts
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.diversity import pairwise_distance
from tiltflow.evaluation.watch.drift import log_velocity_gap
from tiltflow.evaluation.watch.history import TEACHER, Array, Measurement
from tiltflow.method.sampling import DRAW_OFFSET, numbered_noise, sample_few_step, sample_ode
from tiltflow.models.backbone import Conditioning
from tiltflow.models.medium import Features
from tiltflow.models.roles import Role, Roles
from tiltflow.rewards.combine import RewardMixture


@dataclass(frozen=True)
class FixedPrompts:
    """Samples of a role on prompts and noise that stay the same through a run, and over runs.

    Sample i has prompt i (modulo their number) and noise number i; `batch` samples at a time.
    Every rank makes its part of the `images`, and has all of them.
    """

    encoded: EncodedPrompts
    sigmas: Tensor
    eta: float
    batch: int
    ranks: Ranks = ALONE
    randomness: Randomness = field(default_factory=lambda: Randomness(0))

    def batches(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """Samples by number, in batches."""
        return [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]

    def select(self, rows: Sequence[int], role: Role) -> tuple[Conditioning, list[Prompt]]:
        """The conditioning and the prompts of some samples."""
        return self.encoded.select([r % len(self.encoded) for r in rows], role.backbone.device)

    def latents(self, role: Role, rows: Sequence[int], draw: int = 0) -> Tensor:
        """Few-step samples (B, ...) on the role's device; `draw` = 0, 1, … has other noise."""
        cond, _ = self.select(rows, role)
        numbers = [row + draw * DRAW_OFFSET for row in rows]
        return sample_few_step(role, cond, numbers, self.randomness, self.sigmas, self.eta)

    @torch.no_grad()
    def images(self, role: Role, count: int) -> Tensor:
        """The first samples, decoded, (count, …), on the CPU.

        Raises:
            NonFiniteError: on every rank, naming the first prompt whose image is not finite: it
                would be black in a file.
        """
        rows = self.ranks.spread(count)
        parts = [self.latents(role, some) for some in self.batches(rows)]
        images = torch.cat([role.backbone.decode(x).cpu() for x in parts])
        images = self.ranks.collect(images, count)
        finite = images.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            text = self.encoded.prompts[finite.index(False) % len(self.encoded)].text
            one = role.backbone.medium.one
            raise NonFiniteError(f"the {one} that {role.name} made of {text!r} is not finite")
        return images


@dataclass(frozen=True)
class ProbeSettings:
    """How much is measured, and where.

    `samples` for rewards, drift and spectrum; `groups` of `draws` images of one prompt for
    diversity; `teacher_samples` of the teacher's own in `teacher_sigmas` steps with `guidance`;
    drift at `levels` of noise; the spectrum above `cutoff`, in cycles a pixel.
    """

    samples: int
    groups: int
    draws: int
    teacher_samples: int
    teacher_sigmas: Tensor
    guidance: float
    levels: tuple[float, ...]
    cutoff: float


@dataclass(frozen=True)
class Probes:
    """Everything a measurement needs. `features` maps samples to (B, F), or is None where
    diversity is not measured.
    """

    fixed: FixedPrompts
    roles: Roles
    held_out: RewardMixture
    trained: RewardMixture | None
    features: Features | None
    settings: ProbeSettings

    @torch.no_grad()
    def measure(self, step: int, teacher: bool) -> Measurement:
        """One measurement of the EMA generator; with `teacher`, of the teacher's samples too."""
        parts: dict[str, list[Tensor]] = {}
        features: list[Tensor] = []
        for rows in self.fixed.batches(range(self.settings.samples)):
            x0 = self.fixed.latents(self.roles.ema, rows)
            images = self.roles.ema.backbone.decode(x0)
            found = self._scores(rows, images) | self._measured(rows, x0, images)
            for name, column in found.items():
                parts.setdefault(name, []).append(column.double().cpu())
            inside = sum(row < self.settings.groups for row in rows)
            if self.features is not None and inside:
                features.append(self.features(images[:inside]).float().cpu())
        values: dict[str, Array] = {k: torch.cat(series).numpy() for k, series in parts.items()}
        if self.features is not None:
            values["diversity"] = self._diversity(torch.cat(features), self.features)
        if teacher:
            values |= self._teacher()
        return Measurement(step, values, prompts=self._prompts())

    def _prompts(self) -> tuple[int, ...]:
        """The number of each sample's prompt; none where all differ."""
        texts = [prompt.text for prompt in self.fixed.encoded.prompts]
        numbers: dict[str, int] = {}
        found = tuple(
            numbers.setdefault(texts[row % len(texts)], len(numbers))
            for row in range(self.settings.samples)
        )
        return found if len(numbers) < len(found) else ()

    def _scores(self, rows: Sequence[int], images: Tensor) -> dict[str, Tensor]:
        """Every reward's scores (B,)."""
        _, prompts = self.fixed.select(rows, self.roles.ema)
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        values: dict[str, Tensor] = {}
        for group, rewards in (("held_out", self.held_out), ("trained", self.trained)):
            if rewards is not None:
                scores = rewards.score(images, texts, metadata)
                values |= {f"{group}/{name}": v for name, v in scores.items()}
        return values

    def _measured(self, rows: Sequence[int], x0: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Drift, and what the medium measures (of images the high-frequency energy): (B,) each, of
        anyone's samples."""
        teacher = self.roles.teacher
        cond, _ = self.fixed.select(rows, teacher)
        levels = self.settings.levels
        noises = [
            numbered_noise(self.fixed.randomness, f"sample/drift{j}", rows, tuple(x0.shape[1:]))
            for j in range(len(levels))
        ]
        field = teacher.field(cond, self.settings.guidance)
        values = {"drift": log_velocity_gap(x0, levels, noises, field)}
        probes = teacher.backbone.medium.probes
        return values | {name: of(images, self.settings.cutoff) for name, of in probes.items()}

    def _diversity(self, first: Tensor, features: Features) -> Array:
        """The mean pairwise cosine distance of each group's images; the first draw is given."""
        draws = [first]
        for draw in range(1, self.settings.draws):
            parts = []
            for rows in self.fixed.batches(range(len(first))):
                x0 = self.fixed.latents(self.roles.ema, rows, draw)
                parts.append(features(self.roles.ema.backbone.decode(x0)).float().cpu())
            draws.append(torch.cat(parts))
        return pairwise_distance(torch.stack(draws, 1)).double().numpy()

    def _teacher(self) -> dict[str, Array]:
        """The same of the teacher's own samples on the first prompts, from the same noise."""
        role, parts = self.roles.teacher, dict[str, list[Tensor]]()
        for rows in self.fixed.batches(range(self.settings.teacher_samples)):
            cond, _ = self.fixed.select(rows, role)
            sigmas, guidance = self.settings.teacher_sigmas, self.settings.guidance
            x0 = sample_ode(role, cond, rows, self.fixed.randomness, sigmas, guidance)
            for name, values in self._measured(rows, x0, role.backbone.decode(x0)).items():
                parts.setdefault(TEACHER + name, []).append(values.double().cpu())
        return {name: torch.cat(series).numpy() for name, series in parts.items()}

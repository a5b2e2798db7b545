"""The systems that are sampled and scored: a model, its LoRA folders loaded as diffusers does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tiltflow.core.randomness import Randomness
from tiltflow.core.sizes import said
from tiltflow.data.embeddings import EncodedPrompts
from tiltflow.evaluation.scores import System
from tiltflow.formats.writing import load_lora
from tiltflow.method.sampling import DRAW_OFFSET, sample_few_step, sample_ode
from tiltflow.models.backbone import Backbone, Conditioning
from tiltflow.models.lora_files import adapter_keys, count_pairs
from tiltflow.models.roles import Role
from tiltflow.models.switch import FEW_STEP, TILT, AdapterSwitch, stack_tilt

TEACHER = "teacher"
"""The system that others are measured against: the teacher with all its steps."""

DECODED_AT_ONCE = 16
"""Images, or latent frames of videos: more do not fit a CPU's caches (on the embedded model half as
fast), nor a GPU's memory where images are large."""


@dataclass(frozen=True)
class Loaded:
    """A backbone with its adapters: the teacher, and the students by name.

    A merged pipeline is a student by itself and has no teacher.
    """

    backbone: Backbone
    teacher: Role | None
    students: dict[str, Role]


def load_students(
    backbone: Backbone,
    few_step: Path | None,
    tilt: Path | None,
    strength: float = 1.0,
    autocast: torch.dtype | None = None,
    guidance: float | None = None,
    baked: bool = False,
) -> Loaded:
    """Loads LoRA folders through the pipeline's own loader.

    The students are `ac_dmd` (the few-step adapter) and `rtdmd` (the tilt adapter on top, at
    `strength` in [0, 1.5]), of a LoRA in which both are `baked` the latter; of a merged pipeline,
    whose scheduler is the students', itself: `merged`. Every network runs under `autocast`, if
    given; the students with `guidance`, None being what the model's own expect.

    Raises:
        ValueError: if a folder holds no LoRA, or one of another model.
    """
    from tiltflow.scheduler import CPSFlowMatchScheduler

    made = partial(Role, autocast=autocast, guidance=guidance)
    if isinstance(backbone.pipe.scheduler, CPSFlowMatchScheduler):  # type: ignore[attr-defined]
        if few_step is not None:
            raise ValueError("this pipeline has its few-step weights merged in: give no --few-step")
        return Loaded(backbone, None, {"merged": made("merged", backbone, backbone.student_base)})
    if tilt is not None and few_step is None:
        raise ValueError("--tilt-lora needs --few-step, the adapter that it was trained on")
    for name, folder in ((FEW_STEP, few_step), (TILT, tilt)):
        if folder is not None:
            load_adapter(backbone, name, folder)
    teacher_switch = AdapterSwitch(backbone.teacher_base)
    student = backbone.student_base
    switch = teacher_switch if student is backbone.teacher_base else AdapterSwitch(student)
    if tilt is not None:
        switch.scale(TILT, strength)
    students: dict[str, Role] = {}
    if few_step is not None:
        name = "rtdmd" if baked else "ac_dmd"
        students[name] = made(name, backbone, student, (FEW_STEP,), switch)
    if tilt is not None:
        students["rtdmd"] = made("rtdmd", backbone, student, stack_tilt(), switch)
    base = backbone.teacher_base
    teacher = Role("teacher", backbone, base, (), teacher_switch, autocast=autocast)
    return Loaded(backbone, teacher, students)


def load_adapter(backbone: Backbone, name: str, folder: Path) -> None:
    """A LoRA folder onto the student's base, through the pipeline's own loader.

    Raises:
        ValueError: if the folder holds no LoRA, or one of another model.
    """
    from peft import get_peft_model_state_dict

    pipe = backbone.pipe  # type: ignore[attr-defined]
    # klein's LoRAs belong to its second base, which the pipeline does not hold
    teacher, student = pipe.transformer, backbone.student_base
    pipe.transformer = student
    try:
        load_lora(pipe, folder, name)
    finally:
        pipe.transformer = teacher
    if name not in getattr(student, "peft_config", {}):
        raise ValueError(f"the LoRA in {folder} has no weight that this model's transformer knows")
    here, saved = set(get_peft_model_state_dict(student, adapter_name=name)), adapter_keys(folder)
    if saved is None:  # other programs' names, of which the libraries leave out what they miss
        known, given = len(here) // 2, count_pairs(folder)
        if known < given:
            raise ValueError(
                f"the LoRA in {folder} has {given} modules in another program's names, of which "
                f"diffusers knows {known}: give it in diffusers' names"
            )
    elif saved != here:
        odd = min(saved ^ here)
        where = "in the LoRA only" if odd in saved else "in this model only"
        raise ValueError(f"the LoRA in {folder} is one of another model: {odd} is {where}")


@dataclass(frozen=True)
class Sampler:
    """How images are made: the few-step grid and η, the teacher's steps and guidance. `levels` are
    a student's by the size's name, where they are not those of the pipeline's scheduler."""

    encoded: EncodedPrompts
    randomness: Randomness
    steps: int = 4
    eta: float = 0.9
    teacher_steps: int = 50
    guidance: float = 4.0
    levels: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def few_step(self, role: Role, rows: Sequence[int], draw: int = 0) -> Tensor:
        """Images of a student, (B, 3, H, W) in [0, 1]."""
        sigmas = self._few_step_levels(role.backbone)
        cond, numbers = self._batch(role, rows, draw)
        latents = sample_few_step(role, cond, numbers, self.randomness, sigmas, self.eta)
        return self._images(role, latents, rows)

    def _few_step_levels(self, backbone: Backbone) -> Tensor:
        """The students' σ₀ > … > σ_K = 0, (K + 1,) in fp32."""
        if self.levels:  # of pipelines only, which have a size
            own = self.levels.get(said(backbone.resolution))  # type: ignore[attr-defined]
            if own is not None and len(own) == self.steps + 1:
                return torch.tensor(own, dtype=torch.float32)
        return backbone.few_step_sigmas(self.steps)

    def ode(self, role: Role, sigmas: Tensor, rows: Sequence[int], draw: int = 0) -> Tensor:
        """Images of the teacher's ODE, with guidance."""
        cond, numbers = self._batch(role, rows, draw)
        latents = sample_ode(role, cond, numbers, self.randomness, sigmas, self.guidance)
        return self._images(role, latents, rows)

    def _batch(self, role: Role, rows: Sequence[int], draw: int) -> tuple[Conditioning, list[int]]:
        cond, _ = self.encoded.select(rows, role.backbone.device)
        return cond, [row + draw * DRAW_OFFSET for row in rows]

    def _images(self, role: Role, latents: Tensor, rows: Sequence[int]) -> Tensor:
        """Latents decoded.

        Raises:
            ValueError: naming the first prompt whose latent or image is not finite: it would be
                black in a file.
        """
        self._check(role, "latent", latents, rows)
        images = _decode(role, latents)
        self._check(role, role.backbone.medium.one, images, rows)
        return images

    def _check(self, role: Role, what: str, made: Tensor, rows: Sequence[int]) -> None:
        finite = made.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            text = self.encoded.prompts[rows[finite.index(False)]].text
            raise ValueError(f"the {what} that {role.name} made of {text!r} is not finite")

    def systems(self, loaded: Loaded, teacher: bool = True) -> list[System]:
        """`teacher`, `teacher_4_step` (its own ODE in as many steps as the students), students."""
        passes = loaded.backbone.passes(self.guidance)
        made = []
        if teacher and loaded.teacher is not None:
            grids = {
                TEACHER: loaded.backbone.teacher_sigmas(self.teacher_steps),
                f"teacher_{self.steps}_step": loaded.backbone.few_step_sigmas(self.steps),
            }
            for name, sigmas in grids.items():
                nfe = passes * (len(sigmas) - 1)
                made.append(_system(name, nfe, self._ode(loaded.teacher, sigmas)))
        for name, role in loaded.students.items():
            own = 1.0 if role.guidance is None else role.guidance
            nfe = self.steps * loaded.backbone.passes(own)
            made.append(_system(name, nfe, self._student(role)))
        return made

    def _ode(self, role: Role, sigmas: Tensor) -> Callable[[Sequence[int], int], Tensor]:
        return lambda rows, draw: self.ode(role, sigmas, rows, draw)

    def _student(self, role: Role) -> Callable[[Sequence[int], int], Tensor]:
        return lambda rows, draw: self.few_step(role, rows, draw)


def _system(name: str, nfe: int, make: Callable[[Sequence[int], int], Tensor]) -> System:
    # Draw 0 is the evaluation's own; diversity starts at 1, on noise of its own.
    return System(name, nfe, lambda rows: make(rows, 0), lambda rows, draw: make(rows, draw + 1))


@torch.no_grad()
def _decode(role: Role, latents: Tensor) -> Tensor:
    frames = latents.shape[2] if latents.ndim == 5 else 1
    parts = latents.split(max(1, DECODED_AT_ONCE // frames))
    return torch.cat([role.backbone.decode(part) for part in parts])

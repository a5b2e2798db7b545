"""A student with its tilts as dials: images and scores at any strengths, while it stays loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.limits import LONGEST_SIDE, check_tilt
from tiltflow.core.precision import attention_of, autocast_dtype
from tiltflow.core.randomness import Randomness
from tiltflow.core.sizes import frames_of, said
from tiltflow.data.embeddings import EncodedPrompts, encode_prompts
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.statistics import score_ci
from tiltflow.models.backbone import Backbone
from tiltflow.models.lora_files import lora_mark
from tiltflow.models.roles import Role
from tiltflow.models.switch import FEW_STEP, AdapterSwitch
from tiltflow.rewards.combine import RewardMixture
from tiltflow.rewards.remote.asking import ranks
from tiltflow.setup.assemble import build_rewards
from tiltflow.setup.run_directory import check_run
from tiltflow.tasks.dial_runs import Exam, check_alike, plan_exams
from tiltflow.tasks.report import run_names
from tiltflow.tasks.request import Request, backbone_of, check_request
from tiltflow.tasks.systems import Sampler, load_adapter

MOST_STEPS = 64
MOST_DIALS = 8
KEPT = 32
"""Prompts whose encoding is kept."""


@dataclass(frozen=True)
class Scorer:
    """A loaded `Exam`: encoded prompts, the seed of their noise, and rewards that some run trained
    on and others, if there are any."""

    fixed: EncodedPrompts
    seed: int
    trained: RewardMixture | None
    held_out: RewardMixture | None


@dataclass
class Student:
    """A loaded student. `dials` are the names of its tilts' adapters, in the order of the runs.

    `cfg` and `request` are of the first run, as which the others are sampled; `trained_by` are, by
    reward, the numbers of the dials whose runs trained on it. Not safe to call from two threads at
    once.
    """

    role: Role
    switch: AdapterSwitch
    dials: tuple[str, ...]
    request: Request
    cfg: RunConfig
    scorers: tuple[Scorer, ...]
    trained_by: Mapping[str, tuple[int, ...]]
    encoded: OrderedDict[str, EncodedPrompts]

    @property
    def backbone(self) -> Backbone:
        return self.role.backbone

    @property
    def fixed(self) -> EncodedPrompts:
        """The first run's held-out prompts."""
        return self.scorers[0].fixed

    def image(self, strengths: Sequence[float], text: str, seed: int, steps: int) -> Tensor:
        """An image (3, H, W) in [0, 1] of any prompt.

        Raises:
            ValueError: if there are other than one strength a dial, or a number is out of range.
        """
        if not 0 <= seed < 2**63:
            raise ValueError("a seed goes from 0 to 2^63 − 1")
        return self._sample(strengths, self._encode(text), [0], seed, steps)[0]

    def scores(self, strengths: Sequence[float], steps: int) -> dict[str, dict[str, Any]]:
        """Each reward on held-out prompts and fixed noise, of images in `steps` steps: its mean and
        95% interval, and whether some run trained on it.

        Raises:
            ValueError: as `image`.
        """
        trained: dict[str, dict[str, Any]] = {}
        held_out: dict[str, dict[str, Any]] = {}
        for scorer in self.scorers:
            rows = list(range(len(scorer.fixed)))
            images = self._sample(strengths, scorer.fixed, rows, scorer.seed, steps)
            texts = [prompt.text for prompt in scorer.fixed.prompts]
            about = [prompt.metadata for prompt in scorer.fixed.prompts]
            for found, rewards in ((trained, scorer.trained), (held_out, scorer.held_out)):
                scored = {} if rewards is None else rewards.score(images, texts, about)
                for name, values in scored.items():
                    mean, low, high = score_ci(values.double().cpu().numpy(), clusters=texts)
                    seen = {"mean": mean, "ci95": [low, high], "trained": found is trained}
                    found[name] = seen
        beside = {f"{n} (held out)" if n in trained else n: seen for n, seen in held_out.items()}
        return trained | beside

    @torch.no_grad()
    def _sample(
        self,
        strengths: Sequence[float],
        encoded: EncodedPrompts,
        rows: list[int],
        seed: int,
        steps: int,
    ) -> Tensor:
        if not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"steps go from 1 to {MOST_STEPS}")
        if len(strengths) != len(self.dials):
            raise ValueError(f"this student has {len(self.dials)} dials")
        for name, strength in zip(self.dials, strengths, strict=True):
            check_tilt("a dial", strength)
            self.switch.scale(name, strength)
        chosen = self.request.settled
        sampler = Sampler(encoded, Randomness(seed), steps, chosen.eta, levels=chosen.levels)
        mixed = self.role.autocast
        with attention_of(self.backbone.device, mixed) if mixed else nullcontext():
            return sampler.few_step(self.role, rows)

    def _encode(self, text: str) -> EncodedPrompts:
        if text not in self.encoded:
            self.encoded[text] = encode_prompts(self.backbone, [Prompt(text, {})], batch_size=1)
        self.encoded.move_to_end(text)
        while len(self.encoded) > KEPT:
            self.encoded.popitem(last=False)
        return self.encoded[text]


def load_student(runs: Sequence[Path], side: int | None, device: str) -> Student:
    """The student of one or several stage-2 runs over the same few-step adapter, a dial each, with
    all it needs in memory. `side` is another size than the run's, in pixels.

    Raises:
        ValueError: if a run has not been exported, they are of different students, are sampled
            differently or have different rewards of one name, or anything does not load.
    """
    if not 1 <= len(runs) <= MOST_DIALS:
        raise ValueError(f"choose from 1 to {MOST_DIALS} runs")
    if side is not None and not 8 <= side <= LONGEST_SIDE:
        raise ValueError(f"a size goes from 8 to {LONGEST_SIDE} pixels")
    for run in runs:
        check_run(run)
    cfgs = [load_config(str(run / "config.yaml"), []) for run in runs]
    few_step = _common_few_step(runs)
    requests = [
        _request(run, cfg, few_step, side, device) for run, cfg in zip(runs, cfgs, strict=True)
    ]
    named = run_names(list(dict.fromkeys(runs)))
    names = [named[run] for run in runs]
    if len(runs) > 1:
        check_alike(names, requests)
    exams = plan_exams(names, cfgs)
    check_request(requests[0])
    return _load(cfgs, requests, exams)


def _request(run: Path, cfg: RunConfig, few_step: Path, side: int | None, device: str) -> Request:
    """How a run's student is sampled, its tilt on `few_step`.

    Raises:
        ValueError: if it has no tilt, or its model no adapters.
    """
    tilt = run / "export" / "tilt"
    if not tilt.is_dir():
        raise ValueError(f"{run.name} has no export/tilt yet: a dial is of a finished stage 2")
    request = Request(
        model=cfg.model.path,
        prompts=[],
        few_step=few_step,
        tilt_lora=tilt,
        generator_path=cfg.model.generator_path,
        family=cfg.model.family,
        autocast=cfg.model.autocast,
        resolution=side,
        device=device,
    )
    if not request.has_files:
        raise ValueError(f"the {request.model} backbone has no adapters to dial")
    return request


def _load(cfgs: Sequence[RunConfig], requests: Sequence[Request], exams: Sequence[Exam]) -> Student:
    first = requests[0]
    assert first.few_step is not None
    size = first.settled.resolution
    if size is not None and frames_of(size) > 1:
        raise ValueError(
            f"the student makes videos ({said(size)}), and a dial is of pictures: compare "
            "strengths with tiltflow evaluate --tilt"
        )
    backbone = backbone_of(first, "all")
    load_adapter(backbone, FEW_STEP, first.few_step)
    dials = tuple(f"tilt_{number}" for number in range(len(requests)))
    for name, request in zip(dials, requests, strict=True):
        assert request.tilt_lora is not None
        load_adapter(backbone, name, request.tilt_lora)
    backbone.thaw()  # type: ignore[attr-defined]
    base = backbone.student_base
    switch = AdapterSwitch(base)
    mixed, guidance = autocast_dtype(first.autocast, backbone.device), first.settled.guidance
    role = Role(
        "dial", backbone, base, (FEW_STEP, *dials), switch, autocast=mixed, guidance=guidance
    )
    scorers = tuple(_scorer(exam, backbone) for exam in exams)
    _check_names(scorers)
    return Student(
        role,
        switch,
        dials,
        replace(first, prompts=exams[0].prompts),
        cfgs[0],
        scorers,
        _trained_by(cfgs, exams, scorers),
        OrderedDict(),
    )


def _scorer(exam: Exam, backbone: Backbone) -> Scorer:
    return Scorer(
        encode_prompts(backbone, exam.prompts, batch_size=len(exam.prompts)),
        exam.seed,
        build_rewards(exam.trained, backbone) if exam.trained else None,
        build_rewards(exam.held_out, backbone) if exam.held_out else None,
    )


def _check_names(scorers: Sequence[Scorer]) -> None:
    """That rewards of several runs have names of their own: by these their figures are known.

    Raises:
        ValueError: if two of those that were trained on, or two that were held out, have one.
    """
    for group in ("trained", "held_out"):
        names = [name for each in scorers for name in _names(getattr(each, group))]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two rewards of these runs call themselves {name!r}: dial them one by one"
                )


def _trained_by(
    cfgs: Sequence[RunConfig], exams: Sequence[Exam], scorers: Sequence[Scorer]
) -> dict[str, tuple[int, ...]]:
    """By the rewards' own names, the numbers of the runs that trained on them."""
    found = {}
    for exam, scorer in zip(exams, scorers, strict=True):
        asked = [name for name, of in exam.trained.items() if not ranks(name, of.options)]
        for name, reward in zip(asked, _names(scorer.trained), strict=True):
            found[reward] = tuple(i for i, cfg in enumerate(cfgs) if name in cfg.rewards)
    return found


def _common_few_step(runs: Sequence[Path]) -> Path:
    """The few-step adapter that all runs were trained on.

    Raises:
        ValueError: if one has none, or another.
    """
    folders = [run / "export" / "few_step" for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if not folder.is_dir():
            raise ValueError(f"{run.name} has no export yet: a dial is of a finished stage 2")
    digests = {lora_mark(folder) for folder in folders}
    if len(digests) > 1:
        raise ValueError("these runs stand on different few-step adapters: dial them one by one")
    return folders[0]


def facts(student: Student) -> Mapping[str, Any]:
    """What a page needs to draw the dials; under `trained`, by reward, the numbers of those whose
    runs trained on it."""
    chosen = student.request.settled
    texts = [prompt.text for scorer in student.scorers for prompt in scorer.fixed.prompts]
    return {
        "steps": chosen.steps,
        "side": student.backbone.resolution,  # type: ignore[attr-defined]
        "prompts": list(dict.fromkeys(texts)),
        "trained": student.trained_by,
        "held_out": [name for scorer in student.scorers for name in _names(scorer.held_out)],
    }


def _names(rewards: RewardMixture | None) -> list[str]:
    return [] if rewards is None else list(rewards.names)

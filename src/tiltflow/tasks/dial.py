"""A student with its tilts as dials: images and scores at any strengths, while it stays loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tiltflow.config.load import RunConfig, load_config, read_prompts
from tiltflow.core.limits import LONGEST_SIDE, check_tilt
from tiltflow.core.precision import attention_of, autocast_dtype
from tiltflow.core.randomness import Randomness
from tiltflow.data.embeddings import EncodedPrompts, encode_prompts
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.statistics import mean_ci
from tiltflow.models.backbone import Backbone
from tiltflow.models.lora_files import lora_file
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint
from tiltflow.models.roles import Role
from tiltflow.models.switch import FEW_STEP, AdapterSwitch
from tiltflow.rewards.combine import RewardMixture
from tiltflow.setup.assemble import build_rewards
from tiltflow.tasks.request import Request, backbone_of, check_request
from tiltflow.tasks.systems import Sampler, load_adapter

MOST_STEPS = 64
MOST_DIALS = 8
SCORED = 16
"""Held-out prompts, from the run's fixed noise, that strengths are scored on."""
KEPT = 32
"""Prompts whose encoding is kept."""


@dataclass
class Student:
    """A loaded student. `dials` are the names of its tilts' adapters, in the order of the runs.

    Not safe to call from two threads at once.
    """

    role: Role
    switch: AdapterSwitch
    dials: tuple[str, ...]
    request: Request
    cfg: RunConfig
    fixed: EncodedPrompts
    trained: RewardMixture | None
    held_out: RewardMixture | None
    encoded: OrderedDict[str, EncodedPrompts]

    @property
    def backbone(self) -> Backbone:
        return self.role.backbone

    def image(self, strengths: Sequence[float], text: str, seed: int, steps: int) -> Tensor:
        """An image (3, H, W) in [0, 1] of any prompt.

        Raises:
            ValueError: if there are other than one strength a dial, or a number is out of range.
        """
        if not 0 <= seed < 2**63:
            raise ValueError("a seed goes from 0 to 2^63 − 1")
        return self._sample(strengths, self._encode(text), [0], seed, steps)[0]

    def scores(self, strengths: Sequence[float], steps: int) -> dict[str, dict[str, Any]]:
        """Each reward on the fixed prompts and noise, of images in `steps` steps: its mean and 95%
        interval, and whether it was trained on.

        Raises:
            ValueError: as `image`.
        """
        rows = list(range(len(self.fixed)))
        images = self._sample(strengths, self.fixed, rows, self.cfg.run.seed, steps)
        texts = [prompt.text for prompt in self.fixed.prompts]
        about = [prompt.metadata for prompt in self.fixed.prompts]
        found: dict[str, dict[str, Any]] = {}
        for trained, rewards in ((True, self.trained), (False, self.held_out)):
            scored = {} if rewards is None else rewards.score(images, texts, about)
            for name, values in scored.items():
                mean, low, high = mean_ci(values.double().cpu().numpy(), clusters=texts)
                key = name if trained or name not in found else f"{name} (held out)"
                found[key] = {"mean": mean, "ci95": [low, high], "trained": trained}
        return found

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
        ValueError: if a run has not been exported, they are of different students, or anything does
            not load.
    """
    if not 1 <= len(runs) <= MOST_DIALS:
        raise ValueError(f"choose from 1 to {MOST_DIALS} runs")
    if side is not None and not 8 <= side <= LONGEST_SIDE:
        raise ValueError(f"a size goes from 8 to {LONGEST_SIDE} pixels")
    cfg = load_config(str(runs[0] / "config.yaml"), [])
    tilts = [run / "export" / "tilt" for run in runs]
    few_step = _common_few_step(runs)
    for run, tilt in zip(runs, tilts, strict=True):
        if not tilt.is_dir():
            raise ValueError(f"{run.name} has no export/tilt yet: a dial is of a finished stage 2")
    request = Request(
        model=cfg.model.path,
        prompts=[],
        few_step=few_step,
        tilt_lora=tilts[0],
        generator_path=cfg.model.generator_path,
        family=cfg.model.family,
        autocast=cfg.model.autocast,
        resolution=side,
        device=device,
    )
    if not request.has_files:
        raise ValueError(f"the {request.model} backbone has no adapters to dial")
    check_request(request)
    return _load(cfg, request, tilts)


def _load(cfg: RunConfig, request: Request, tilts: Sequence[Path]) -> Student:
    assert request.few_step is not None
    backbone = backbone_of(request, "all")
    load_adapter(backbone, FEW_STEP, request.few_step)
    dials = tuple(f"tilt_{number}" for number in range(len(tilts)))
    for name, folder in zip(dials, tilts, strict=True):
        load_adapter(backbone, name, folder)
    backbone.thaw()  # type: ignore[attr-defined]
    base = backbone.student_base
    switch = AdapterSwitch(base)
    mixed, guidance = autocast_dtype(request.autocast, backbone.device), request.settled.guidance
    role = Role(
        "dial", backbone, base, (FEW_STEP, *dials), switch, autocast=mixed, guidance=guidance
    )
    fixed = read_prompts(cfg).fixed[:SCORED]
    return Student(
        role,
        switch,
        dials,
        replace(request, prompts=fixed),
        cfg,
        encode_prompts(backbone, fixed, batch_size=len(fixed)),
        build_rewards(cfg.rewards, backbone) if cfg.rewards else None,
        build_rewards(cfg.watch.rewards, backbone) if cfg.watch.rewards else None,
        OrderedDict(),
    )


def _common_few_step(runs: Sequence[Path]) -> Path:
    """The few-step adapter that all runs were trained on.

    Raises:
        ValueError: if one has none, or another.
    """
    folders = [run / "export" / "few_step" for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if not folder.is_dir():
            raise ValueError(f"{run.name} has no export yet: a dial is of a finished stage 2")
    digests = {adapter_fingerprint(load_file(lora_file(folder))) for folder in folders}
    if len(digests) > 1:
        raise ValueError("these runs stand on different few-step adapters: dial them one by one")
    return folders[0]


def facts(student: Student) -> Mapping[str, Any]:
    """What a page needs to draw the dials."""
    chosen = student.request.settled
    return {
        "steps": chosen.steps,
        "side": int(student.backbone.resolution),  # type: ignore[attr-defined]
        "prompts": [prompt.text for prompt in student.fixed.prompts],
        "trained": _names(student.trained),
        "held_out": _names(student.held_out),
    }


def _names(rewards: RewardMixture | None) -> list[str]:
    return [] if rewards is None else [item.reward.name for item in rewards.rewards]

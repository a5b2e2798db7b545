"""What is SANA's alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import logging

from tiltflow.formats.writing import few_step_scheduler
from tiltflow.models.families import load_backbone
from tiltflow.models.pipelines.directory import Pipeline

Tiny = Callable[[str], Path]


def load(path: Path) -> Any:
    return load_backbone(path, device="cpu", resolution=64, max_sequence_length=48)


def edited(path: Path, to: Path, file: str, **values: object) -> Path:
    shutil.copytree(path, to)
    config = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps({**config, **values}))
    return to


def test_a_students_scheduler_is_given_nothing_of_the_solvers(
    tiny_pipeline: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    """Of which diffusers would warn whoever exports."""
    logging.enable_propagation()
    try:
        made = few_step_scheduler(Pipeline(tiny_pipeline("sana")), 0.9)
    finally:
        logging.disable_propagation()
    assert not caplog.records and (made.config.shift, made.config.eta) == (3.0, 0.9)


def test_a_students_levels_have_the_solvers_shift(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    other = edited(
        tiny_pipeline("sana"), tmp_path / "m", "scheduler/scheduler_config.json", flow_shift=6.0
    )
    for path, shift in ((tiny_pipeline("sana"), 3.0), (other, 6.0)):
        raw = torch.tensor([1, 0.75, 0.5, 0.25])
        wanted = torch.cat([shift * raw / (1 + (shift - 1) * raw), torch.zeros(1)])
        backbone = load(path)
        assert torch.allclose(backbone.few_step_sigmas(4), wanted)
        assert torch.equal(backbone.teacher_sigmas(4), backbone.few_step_sigmas(4))
        exported = few_step_scheduler(Pipeline(path), eta=0.0, steps=4)
        exported.set_timesteps(4)
        assert torch.equal(exported.sigmas, backbone.few_step_sigmas(4))


def test_every_time_of_the_solver_is_met(tiny_pipeline: Tiny) -> None:
    """As σ in fp64: t/1000 in fp32 misses a few of them by a rounding."""
    backbone = load(tiny_pipeline("sana"))
    solver = DPMSolverMultistepScheduler.from_config(backbone.scheduler.config)
    solver.set_timesteps(999)
    given: list[torch.Tensor] = []
    hook = backbone.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["timestep"]), with_kwargs=True
    )
    cond = backbone.encode(["a cat"])
    times = solver.timesteps.unique()
    with torch.no_grad():
        rows = torch.zeros(len(times), dtype=torch.long)
        x = torch.zeros(len(times), *backbone.latent_shape)
        backbone.velocity(backbone.teacher_base, x, times.double() / 1000, cond[rows])
    hook.remove()
    assert torch.equal(given[0], times.float())


def test_only_a_prompt_has_the_instruction(tiny_pipeline: Tiny) -> None:
    backbone = load(tiny_pipeline("sana"))
    cond = backbone.encode(["", " A Red CAT "])
    assert (cond.positive["prompt_embeds"][0] - cond.negative["prompt_embeds"][0]).abs().max() > 0.1
    again = backbone.encode(["a red cat"]).positive
    for key, value in again.items():
        assert torch.allclose(value, cond.positive[key][1:], atol=1e-5)
    # the first token, and what follows the instruction but one (red and CAT are no pieces)
    # token of its own, this one does not
    assert cond.positive["prompt_mask"].sum(1).tolist() == [2.0, 4.0]


def test_a_decoder_that_recomputes_has_the_same_gradient(tiny_pipeline: Tiny) -> None:
    backbone = load(tiny_pipeline("sana_wide"))
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    found = []
    for again in (False, True):
        if again:
            backbone.checkpoint_decoder()
        latents = x.clone().requires_grad_(True)
        images = backbone.decode(latents)
        images.square().mean().backward()
        found.append((images.detach(), latents.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().max() > 0


def test_a_network_with_a_guidance_input_is_refused(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    path = edited(
        tiny_pipeline("sana"), tmp_path / "m", "transformer/config.json", guidance_embeds=True
    )
    with pytest.raises(ValueError, match="guidance_embeds., which a SanaPipeline does not give it"):
        load(path)

"""In an iteration the host waits for the device for the scores only (docs/lab/benchmarks.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerator import META, Remote, accelerator, move
from students import MODELS, student
from test_train import recipe

from tiltflow.config.load import load_config
from tiltflow.setup.build import build_stage


def test_the_make_believe_device_notices_every_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiltflow.core.transfer import to_device

    host = torch.arange(3.0)
    with accelerator(monkeypatch) as device:
        there = to_device(host, META)
        doubled = (2 * there).sum() + torch.ones((), device=META) + there.new_zeros(())
        chosen = torch.where(there > 0, there, 5.0)[torch.zeros(2, dtype=torch.int64, device=META)]
        assert isinstance(doubled, Remote) and isinstance(chosen, Remote) and not device.syncs
        for wait in (
            lambda: float(doubled),
            lambda: bool(doubled > 1),
            lambda: doubled.item(),
            lambda: there.cpu(),
            lambda: there.to("cpu", non_blocking=True),
            lambda: there[there > 0],
            lambda: there.nonzero(),
            lambda: torch.equal(there, there),
            lambda: host.to(META),
            lambda: host.to(META, non_blocking=True),  # not pinned
            lambda: there.copy_(host),
        ):
            device.syncs.clear()
            wait()
            assert device.syncs


TOKENS = ["model.max_sequence_length=64"]
CLIP = "rewards={'clipscore': 1.0}"
CASES = [
    ("sd35m", "cold_start", ["cold_start.reuse=2"]),
    pytest.param(
        "sd35m",
        "tilt",
        ["tilt.match_steps=random", "tilt.log_prob=gaussian", CLIP],
        marks=pytest.mark.long,
    ),
    pytest.param("sd35m", "cold_start", ["adapters.kind=copies"], marks=pytest.mark.long),
    pytest.param("flux1_dev", "cold_start", [], marks=pytest.mark.long),
    pytest.param("flux2_klein_4b", "tilt", ["tilt.kl=0.1"], marks=pytest.mark.long),
    pytest.param("qwen_image_21", "cold_start", TOKENS, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "stage", "more"), CASES)
def test_no_iteration_waits_for_the_device(
    tiny_pipeline: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stage: str,
    more: list[str],
) -> None:
    """Two iterations of each stage, with a generator update; a copy that waits counts as well."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na red bird\n")
    base, generator = MODELS[name]
    of_run = ["model.resolution=64", "adapters.targets=null"]
    of_run += [f"model.generator_path={tiny_pipeline(generator)}"] if generator else []
    if stage == "tilt":
        below = student(tiny_pipeline, name, tmp_path / "student").export / "few_step"
        of_run += [f"model.few_step={below}"]
    arguments = recipe(stage, tiny_pipeline(base), prompts, tmp_path / "run", *of_run, *more)
    build = build_stage(load_config(f"demo_{stage}", arguments))
    roles, backbone = build.stage.roles, build.backbone
    every = [roles.generator, *roles.fake_score.singles, roles.teacher, roles.ema, roles.reference]
    networks = [r.network for r in every if r is not None] + [backbone.vae]
    if stage == "tilt":
        scorers = [item.reward for item in build.stage.rewards.rewards]
        networks += [scorer.model for scorer in scorers if hasattr(scorer, "model")]
    for network in {id(n): n for n in networks}.values():
        move(network)
    backbone.device = META
    before = {k: v.inner.clone() for k, v in roles.ema.state().items()}
    with accelerator(monkeypatch) as device:
        for step in (0, 1):
            build.stage.iteration(step)
        waits = [wait for wait in device.syncs if " > scoring." not in wait]
    assert not waits, waits
    assert any(not torch.equal(v.inner, before[k]) for k, v in roles.ema.state().items())

"""What `doctor` counts of the reward models that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import call

from tiltflow.commands.doctor import reward_models
from tiltflow.config import load_config
from tiltflow.planner import GIB
from tiltflow.rewards.base import load_reward
from tiltflow.rewards.memory import reward_bytes


@pytest.mark.parametrize("name", ["clipscore", "clipscore_heldout"])
def test_a_packaged_reward_is_counted_as_it_loads(name: str) -> None:
    model = load_reward(name).model  # type: ignore[attr-defined]
    loaded = sum(p.numel() * p.element_size() for p in model.parameters())
    assert reward_bytes(name, None, {}) == pytest.approx(loaded, rel=0.01)


def test_weights_on_disk_are_counted_in_the_type_that_they_run_in(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(10, 100, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert reward_bytes("pickscore", str(tmp_path), {}) == 4_000
    assert reward_bytes("hpsv3", str(tmp_path), {}) == 2_000
    assert reward_bytes("hpsv3", str(tmp_path), {"dtype": "fp32"}) == 4_000
    torch.save({"w": torch.zeros(1000)}, tmp_path / "old.pt")
    assert reward_bytes("pickscore", str(tmp_path / "old.pt"), {}) == pytest.approx(4_000, rel=0.5)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        reward_bytes("pickscore", str(tmp_path), {})


def test_what_is_elsewhere_or_has_no_weights_is_nothing_and_the_unknown_is_said() -> None:
    for name in ("shapes", "linear", "ocr", "remote:http://127.0.0.1:8000/hpsv3"):
        assert reward_bytes(name, None, {}) == 0
    assert reward_bytes("my.module:Reward", None, {}) is None
    assert reward_bytes("pickscore", "some/model", {}) is None


def test_the_published_recipe_is_not_said_to_fit_where_its_rewards_do_not() -> None:
    models, unknown = reward_models(load_config("sd35m_tilt", ["data.prompts=x"]))
    assert not unknown
    assert {"reward pickscore", "reward hpsv2", "reward geneval"} <= set(models)
    assert sum(models.values()) > 9 * GIB


def test_doctor_adds_them_to_the_plan(
    tiny_pipeline: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle on black\n")
    save_file({"w": torch.zeros(GIB // 16, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    line = [
        "doctor", "sd35m_tilt", f"model.path={tiny_pipeline('sd35m')}", "model.resolution=32",
        "data.prompts=prompts.txt", "watch.rewards={}", "--memory", "1.6",
        "model.gradient_checkpointing=true",
    ]  # fmt: skip
    assert call(monkeypatch, *line, "rewards={shapes: 1.0}") == 0
    assert "\nfits into 1.6 GiB" in capsys.readouterr().out
    assert (
        call(monkeypatch, *line, f"rewards={{pickscore: {{weight: 1.0, path: {tmp_path}}}}}") == 0
    )
    said = capsys.readouterr().out
    assert "reward pickscore" in said and "0.25" in said and "does not fit into 1.6 GiB" in said

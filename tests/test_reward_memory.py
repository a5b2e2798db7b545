"""What `doctor` counts of the reward models that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import call

from tiltflow.config.load import load_config
from tiltflow.rewards.base import load_reward
from tiltflow.rewards.sizes import reward_memory
from tiltflow.setup.planner import GIB
from tiltflow.tasks import plans
from tiltflow.tasks.plans import plan_recipe, reward_models


@dataclass(frozen=True)
class Named:
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def test_the_memory_of_rewards_is_that_of_their_weights(tmp_path: Path) -> None:
    clips = {"clipscore": Named(), "clipscore_heldout": Named("packaged:clip_heldout")}
    found = reward_memory(clips)
    for name, size in found.items():
        model = load_reward(name).model  # type: ignore[attr-defined]
        assert size == sum(p.numel() * p.element_size() for p in model.parameters())
    published = reward_memory(
        {name: Named() for name in ("pickscore", "hpsv2", "aesthetic", "image_reward", "geneval")}
    )
    # What their authors publish: ViT-H-14 with 986 million parameters, ViT-L-14 with 428, BLIP
    # with 446, Mask2Former on Swin-S with 69.
    for name, millions in (
        ("pickscore", 986), ("hpsv2", 986), ("aesthetic", 428.6), ("image_reward", 446),
        ("geneval", 428 + 69),
    ):  # fmt: skip
        assert published[name] == pytest.approx(4e6 * millions, rel=0.01), name
    large = reward_memory({"hpsv3": Named(), "geneval2": Named(options={"dtype": "fp32"})})
    assert large["hpsv3"] == pytest.approx(2 * 7.75e9, rel=0.01)
    assert large["geneval2"] == pytest.approx(4 * 8.77e9, rel=0.01)
    others = {"ocr": Named(), "remote:http://x/hpsv3": Named(), "mine:f": Named()}
    assert list(reward_memory(others).values()) == [0, 0, None]
    assert reward_memory({"clipscore": Named("nobody/knows")}) == {"clipscore": None}
    with pytest.raises(ValueError, match="no configuration of a model in"):
        reward_memory({"clipscore": Named(str(tmp_path))})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json describes no CLIPModel: "):
        reward_memory({"clipscore": Named(str(tmp_path))})


def test_a_reward_may_have_no_configuration_in_common_with_its_weights(tmp_path: Path) -> None:
    """Where weights alone are named, the base says what they are."""
    (tmp_path / "HPS.pt").touch()
    assert reward_memory({"hpsv2": Named(str(tmp_path))}) == reward_memory({"hpsv2": Named()})


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
    line = [
        "doctor", "sd35m_tilt", f"model.path={tiny_pipeline('sd35m')}", "model.resolution=32",
        "data.prompts=prompts.txt", "watch.rewards={}", "--memory", "4.0",
        "model.gradient_checkpointing=true",
    ]  # fmt: skip
    assert call(monkeypatch, *line, "rewards={shapes: 1.0}") == 0
    assert "\nfits into 4.0 GiB" in capsys.readouterr().out
    none = ["0" if word == "4.0" else word for word in line]
    assert call(monkeypatch, *none, "rewards={shapes: 1.0}") == 0
    assert "\ndoes not fit into 0.0 GiB" in capsys.readouterr().out
    assert call(monkeypatch, *line, "rewards={pickscore: 1.0}") == 0
    said = capsys.readouterr().out
    assert "reward pickscore" in said and "3.67" in said and "does not fit into 4.0 GiB" in said


def test_a_plan_counts_them_and_room_to_compute_with_the_largest(
    tiny_pipeline: Callable[[str], Path],
) -> None:
    values = [f"model.path={tiny_pipeline('sd35m')}", "model.resolution=64", "data.prompts=x",
              "model.few_step=y", "run.device=cpu", "train.batch_size=24", "watch.rewards={}",
              "train.micro_batch_size=8", "model.gradient_checkpointing=true"]  # fmt: skip
    bare = plan_recipe(load_config("sd35m_tilt", [*values, "rewards={shapes: 1.0}"]))
    made = plan_recipe(load_config("sd35m_tilt", [*values, "rewards={hpsv2: 1.0, pickscore: 1.0}"]))
    one = reward_memory({"hpsv2": Named()})["hpsv2"]
    assert one is not None and one == made.held["reward hpsv2"] == made.held["reward pickscore"]
    assert made.phases["scoring"] == bare.phases["scoring"] + one
    assert made.worst == "scoring" and sum(made.held.values()) == sum(bare.held.values()) + 2 * one
    own = ["watch.rewards={shapes: 1.0}", "watch.clip=openai/clip-vit-large-patch14"]
    watched = plan_recipe(load_config("sd35m_tilt", [*values, *own, "rewards={ocr: 1.0}"]))
    clip = reward_memory({"clipscore": Named("openai/clip-vit-large-patch14")})["clipscore"]
    assert watched.held["watch.clip clipscore"] == clip
    assert watched.phases["scoring"] == bare.phases["scoring"] + clip
    many = "rewards={hpsv2: {weight: 1.0, options: {at_once: 16}}, pickscore: 1.0}"
    larger = plan_recipe(load_config("sd35m_tilt", [*values, many]))  # 16 graphs of .21 of it
    assert larger.phases["scoring"] == pytest.approx(bare.phases["scoring"] + 16 * 0.21 * one)


@pytest.mark.long
def test_a_plan_counts_the_passes_that_a_term_of_ones_own_holds_at_once(
    tiny_pipeline: Callable[[str], Path],
) -> None:
    values = [f"model.path={tiny_pipeline('sd35m')}", "model.resolution=64", "data.prompts=x",
              "model.few_step=y", "run.device=cpu", "train.batch_size=24", "watch.rewards={}",
              "train.micro_batch_size=8", "rewards={shapes: 1.0}"]  # fmt: skip

    def generator(terms: str) -> int:
        chosen = load_config("sd35m_tilt", [*values, f"tilt.terms={terms}"])
        return plan_recipe(chosen).phases["generator"]

    bare, one, two, three = (
        generator(t) for t in ("{}", "{nft: {draws: 1}}", "{nft: {draws: 2}}", "{nft: {draws: 3}}")
    )
    assert bare == one < two < three  # a step of the standard terms is as much as one pass


def test_a_rewards_folder_may_have_any_name() -> None:
    """The room is that of the reward, whatever words are in its path."""
    name = "runs/my reward taste"
    cfg: Any = SimpleNamespace(
        rewards={name: Named(options={"at_once": 16})}, watch=SimpleNamespace(rewards={})
    )
    assert plans._working(cfg, {f"reward {name}": 1000}) == int(16 * plans.OF_IMAGE * 1000)

"""Every published recipe, resolved, against the authors' values (`data/published_runs.yaml`)."""

from __future__ import annotations

import importlib
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiltflow.config.load import RewardConfig, RunConfig, list_recipes, load_config
from tiltflow.config.schema import plain_weight
from tiltflow.rewards.packaged import check_words

FACTS: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "data" / "published_runs.yaml").read_text()
)
MODELS = ("sd3m", "sd35m", "flux1_dev", "flux2_klein_4b", "flux2_klein_9b")
STAGES = ("cold_start", "tilt")
MISSING = "the recipe has no such value"
REWARDS = ("rewards.", "watch.rewards.")


def resolved(cfg: RunConfig, key: str) -> Any:
    """The value of a dotted key, by way of plain types."""
    plain = cfg.model_dump(mode="json")
    return reduce(lambda at, part: (at or {}).get(part, MISSING), key.split("."), plain)


def expected(row: dict[str, Any], model: str) -> Any:
    theirs = row["ours"] if "ours" in row else row["theirs"]
    return theirs[model] if isinstance(theirs, dict) else theirs


def recipes(model: str, stage: str) -> list[str]:
    """The published recipe and its variants for small GPUs."""
    return [name for name in list_recipes() if name.startswith(f"{model}_{stage}")]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_every_row_is_what_the_recipes_do(model: str, stage: str) -> None:
    found = recipes(model, stage)
    assert f"{model}_{stage}" in found
    for name in found:
        cfg = load_config(name, ["data.prompts=prompts.txt"])
        for row in FACTS[stage]:
            small = name != f"{model}_{stage}"
            if small and row["key"].startswith(REWARDS):
                continue  # the other rewards take memory of their own
            value = resolved(cfg, row["key"])
            assert value == expected(row, model), f"{name}: {row['key']} is {value!r}"


def test_rows_name_their_source_and_a_difference_its_reason() -> None:
    assert len(FACTS["source"]["commit"]) == 40
    for stage in STAGES:
        keys = [row["key"] for row in FACTS[stage]]
        assert len(keys) == len(set(keys))
        for row in FACTS[stage]:
            assert row["file"] and row["name"]
            assert ("ours" in row) == ("why" in row), row["key"]
            assert "ours" not in row or row["ours"] != row["theirs"]
    assert all(row["theirs"] and row["ours"] and row["why"] for row in FACTS["differences"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_no_setting_of_the_mathematics_is_left_out(model: str, stage: str) -> None:
    """A recipe states nothing that the table does not have, but for memory, places and logs."""
    free = {
        "train.micro_batch_size", "train.skip_nonfinite", "model.gradient_checkpointing",
        "tilt.decode_chunk", "tilt.keep_graph",
    }  # fmt: skip
    cfg = load_config(f"{model}_{stage}", ["data.prompts=prompts.txt"])
    rows = {row["key"] for row in FACTS[stage]}
    for section in ("train", stage, "adapters", "sampler"):
        values = cfg.model_dump(mode="json")[section]
        defaults = type(getattr(cfg, section)).model_fields
        for key, value in values.items():
            stated = value != defaults[key].get_default(call_default_factory=True)
            name = f"{section}.{key}"
            assert not stated or name in rows | free, name


def test_the_page_of_rewards_has_what_the_recipes_train_on() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    block = page.partition("    rewards:\n")[2].partition("\n\n")[0]
    shown = {name: RewardConfig.model_validate(plain_weight(value))
             for name, value in yaml.safe_load(block).items()}  # fmt: skip
    for model in MODELS:
        assert shown == load_config(f"{model}_tilt", ["data.prompts=prompts.txt"]).rewards


def test_the_reward_of_the_comparison_reads_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks/reference.py` scores by the embedded CLIP, which refuses other words."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    random_model = importlib.import_module("support.random_model")
    texts = random_model.texts()
    assert len(set(texts)) == random_model.PROMPTS
    for text in texts:
        check_words(text, "packaged:clip")

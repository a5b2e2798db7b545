"""Which features diversity was measured in: recorded, part of what a killed evaluation goes on
from, and diversities of two feature spaces are not compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluation import MEAN, PROMPTS, Painter, store, told
from test_study import SMALL

from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.chunks import Chunks
from tiltflow.evaluation.diversity import features_of, last_clip
from tiltflow.models.medium import IMAGES, POINTS
from tiltflow.models.pipelines.fingerprint import files_fingerprint
from tiltflow.rewards import FunctionReward
from tiltflow.tasks import evaluate as evaluating
from tiltflow.tasks.compare import comparisons, other_features, same_features
from tiltflow.tasks.depends import asked
from tiltflow.tasks.request import Request
from tiltflow.tasks.study import RESULT, Cell, cells_of
from tiltflow.tasks.study_file import load_study
from tiltflow.tasks.study_table import comparison_lines, markdown, summarise

ONE, TWO = ({"reward": name, "weights": None} for name in ("clipscore", "clipscore_heldout"))


def clip(name: str) -> Any:
    """A reward that has `image_features`, as an attribute of the object alone."""
    reward: Any = FunctionReward(lambda x, p, m: x.mean((1, 2, 3)), name)
    reward.image_features = lambda x: torch.ones(len(x), 2)
    return reward


def request(rewards: dict[str, str | None], diversity: bool = True) -> Request:
    prompts = [Prompt("a red circle"), Prompt("a blue square")]
    return Request("packaged:pipeline", prompts, device="cpu", rewards=rewards, diversity=diversity)


def test_the_features_are_the_last_clips() -> None:
    rewards = [clip("a"), clip("b"), MEAN]
    assert last_clip(rewards) == 1 and features_of(IMAGES, rewards) is rewards[1].image_features
    assert last_clip([MEAN]) is None and features_of(IMAGES, iter([MEAN])) is None


def test_it_is_said_whose_features_and_weights_they_are(tmp_path: Path) -> None:
    """By the name that was asked for, and by weights that are the same wherever they lie."""
    found = []
    for folder, data in (("one", b"000"), ("two", b"000"), ("three", b"0000"), ("four", b"111")):
        weights = tmp_path / folder / "w.safetensors"
        weights.parent.mkdir()
        weights.write_bytes(data)
        asked_for = request({"mine:Clip": str(weights.parent), "mean": None})
        found.append(evaluating._diversity_in(IMAGES, [clip("c"), MEAN], asked_for))
    content = {"mine:Clip": files_fingerprint(tmp_path / "one")}
    known = {"reward": "mine:Clip", "weights": [["w.safetensors", 3]]}
    assert found[0] == known | {"content": content}
    assert json.loads(json.dumps(found[0])) == found[1] == found[0]
    # the last has a file of the first's name and size, and an earlier version went by these alone
    same = [same_features(found[0], other) for other in (*found, known)]
    assert same == [True, True, False, False, True]
    assert evaluating._diversity_in(POINTS, [MEAN], request({})) == {"medium": "points"}


def test_batches_of_another_order_are_not_taken(tmp_path: Path) -> None:
    names = ("clipscore", "clipscore_heldout")
    orders = [dict.fromkeys(names), dict.fromkeys(reversed(names))]
    one, two = (Chunks(tmp_path, asked(request(order))) for order in orders)
    one.take("teacher/draw0-0", lambda: {"features": torch.zeros(1, 4)})
    taken = two.take("teacher/draw0-0", lambda: {"features": torch.ones(1, 4)})
    assert taken["features"].eq(1).all()
    # without diversity the order decides nothing
    one, two = (Chunks(tmp_path, asked(request(order, False))) for order in orders)
    assert one.folder == two.folder


def test_an_evaluation_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = {name: clip(name) for name in ("a", "b")}
    medium = SimpleNamespace(backbone=SimpleNamespace(medium=IMAGES), teacher=None, students={})
    size = evaluating.AtSize("", range(len(PROMPTS)), [Painter("teacher").system()])
    monkeypatch.setattr(evaluating, "prepare", lambda *_: (medium, None))
    monkeypatch.setattr(evaluating, "at_sizes", lambda *_, **__: [size])
    monkeypatch.setattr(evaluating, "load_rewards", lambda given, *_: [rewards[n] for n in given])
    for order in (["a", "b"], ["b", "a"]):
        given = dataclasses.replace(request(dict.fromkeys(order)), prompts=PROMPTS)
        summary = evaluating.evaluate(given).summary
        assert summary["diversity_in"] == {"reward": order[-1], "weights": None}
    plain = dataclasses.replace(given, diversity=False)
    assert "diversity_in" not in evaluating.evaluate(plain).summary


def test_diversities_in_different_features_are_not_tested(tmp_path: Path) -> None:
    one, two = (
        store(tmp_path / name, [Painter("a", shift), Painter("b", 3.0 + shift)])
        for name, shift in (("one", 0.0), ("two", 1.0))
    )

    def say(path: Path, features: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"diversity_in": features}))

    def tested() -> set[str]:
        return {row["reward"] for row in comparisons([one, two])}

    assert tested() == {"mean", "diversity"}  # of earlier versions, neither says
    say(one, ONE)
    assert tested() == {"mean", "diversity"}  # nor the second
    say(two, ONE)
    assert tested() == {"mean", "diversity"}
    assert "diversity is not compared" not in told([one, two], None, None)
    say(two, TWO)
    assert tested() == {"mean"}
    text = told([one, two], None, None)
    assert (
        "diversity is not compared: it was measured in different features, "
        "those of clipscore and clipscore_heldout\n" in text
    )
    assert "on diversity" not in text and "on mean" in text
    say(two, ONE | {"weights": "org/name"})
    assert "those of clipscore with different weights\n" in told([one, two], None, None)
    assert "on diversity" in told([one], "a,b", None)  # within one evaluation they are the same
    say(two, 3)
    with pytest.raises(ValueError, match=r"is no evaluation \(diversity_in"):
        told([one, two], None, None)


def test_one_that_does_not_say_may_be_of_the_same() -> None:
    said: list[dict[str, Any]] = [{}, {"diversity_in": ONE}, {"diversity_in": TWO}]
    apart = [(i, j) for i in range(3) for j in range(3) if other_features(said[i], said[j])]
    assert apart == [(1, 2), (2, 1)]


@pytest.mark.parametrize(
    ("features", "kept"), [((ONE, TWO), False), ((ONE, ONE), True), ((ONE, None), True)]
)
def test_a_study_leaves_them_out(tmp_path: Path, features: tuple[Any, Any], kept: bool) -> None:
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(SMALL + "diversity: true\n")
    study = load_study(file)
    cells: list[Cell] = cells_of(study, out, ["ac_dmd", "rtdmd"], [0])
    rng = np.random.default_rng(0)
    for cell, of in zip(cells, features, strict=True):
        scores = {name: rng.normal(size=16).tolist() for name in ("linear", "diversity")}
        result = {
            "asked": cell.asked, "row": cell.row, "seed": 0, "stage": cell.config.stage,
            "steps": 1, "cost": {"forward": 1, "backward": 1, "scored": 1, "pulled": 1}, "nfe": 4,
            "vendi": {"mean": 2.0, "ci95": [1.0, 3.0]}, "scores": scores,
        } | ({} if of is None else {"diversity_in": of})  # fmt: skip
        cell.folder.mkdir(parents=True)
        (cell.folder / RESULT).write_text(json.dumps(result))
    summary = summarise(study, out)
    assert any(" on diversity " in line for line in comparison_lines(summary)) == kept
    assert any(" on linear " in line for line in comparison_lines(summary))
    page = markdown(summary)
    assert ("| diversity | vendi |" in page) == kept
    assert ("diversity is not compared: it was measured in different" in page) == (not kept)


@pytest.mark.parametrize("servers", [("c0", "c1"), ("c0", "c0"), ("c0", None)])
def test_a_study_of_another_servers_scores_is_refused(
    tmp_path: Path, servers: tuple[str, str | None]
) -> None:
    """As a reward's files on this machine are: they are no part of the settings either."""
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(SMALL)
    cells: list[Cell] = cells_of(load_study(file), out, ["ac_dmd", "rtdmd"], [0])
    for cell, of in zip(cells, servers, strict=True):
        result = {
            "asked": cell.asked, "row": cell.row, "seed": 0, "stage": cell.config.stage,
            "steps": 1, "cost": {"forward": 1, "backward": 1, "scored": 1, "pulled": 1}, "nfe": 4,
            "vendi": None, "scores": {"x": list(range(16))},
        } | ({} if of is None else {"servers": {"remote:http://a:1/x": of}})  # fmt: skip
        cell.folder.mkdir(parents=True)
        (cell.folder / RESULT).write_text(json.dumps(result))
    if servers[1] == "c1":
        said = "'remote:http://a:1/x' had other contents when it scored rtdmd, seed 0 than for ac_"
        with pytest.raises(ValueError, match=said):
            summarise(load_study(file), out)
    else:
        assert summarise(load_study(file), out)["cells"]["done"] == 2

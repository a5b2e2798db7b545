"""Two evaluations are compared by the rewards, the metadata and the noise that both had: what files
hold counts, not where they lie, when they were written or how long they are."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_evaluation import Painter, store, told

from tiltflow.core.paths import resolve_path
from tiltflow.data.prompts import Prompt, load_prompts
from tiltflow.rewards.fitting import may_read_metadata
from tiltflow.tasks.compare import other_columns
from tiltflow.tasks.depends import asked, content_of
from tiltflow.tasks.evaluate import evaluated
from tiltflow.tasks.request import Request

OWN = "def f(images, prompts, metadata): return {}\n"


def request(rewards: dict[str, str | None], about: dict[str, object] | None = None) -> Request:
    prompts = [Prompt("a red circle", about or {}), Prompt("a blue square")]
    return Request("packaged:pipeline", prompts, device="cpu", rewards=rewards)


def says(path: Path, of: Request, **changes: object) -> Path:
    """An evaluation that says what one of that request would; without `changes` to None."""
    said = {"asked": asked(of), "content": content_of(of)} | changes
    said = json.loads(path.read_text()) | said
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return path


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    return [store(tmp_path / n, [Painter("a"), Painter("b", 3.0)]) for n in ("one", "two")]


def weights(folder: str, data: bytes) -> Request:
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "model.safetensors").write_bytes(data)
    return request({"clipscore": folder})


def test_weights_of_one_name_and_size_are_told_apart(two: list[Path]) -> None:
    says(two[0], weights("w", b"0123"))
    says(two[1], weights("copied", b"0123"))
    os.utime("copied/model.safetensors", (1, 1))
    told(two, "b,a", None)
    other = weights("w", b"3210")
    says(two[1], other)
    with pytest.raises(ValueError, match="have the reward 'clipscore' with other weights"):
        told(two, "b,a", None)
    assert other_columns(*(json.loads(path.read_text()) for path in two)) == ["clipscore"]
    # an earlier version said no more than names and sizes
    says(two[1], other, content=None)
    told(two, "b,a", None)
    says(two[1], weights("w", b"01234"), content=None)
    with pytest.raises(ValueError, match="with other weights"):
        told(two, "b,a", None)
    says(two[1], other, content={"rewards": 3})
    with pytest.raises(ValueError, match=r"is no evaluation \(content.rewards"):
        told(two, "b,a", None)


@pytest.mark.parametrize(
    ("name", "revisions", "asked_at", "refused"),
    [
        ("hpsv2", (None, 2), {"resolution": 64}, False),  # what is not square alone
        ("hpsv2", (None, 2), {"resolution": [64, 96]}, True),
        ("hpsv2", (None, 2), {"sizes": [["64", None], ["64x96", None]]}, True),
        ("hpsv2", (2, 2), {"resolution": [64, 96]}, False),
        ("hpsv2", (3, 2), {"resolution": 64}, True),  # prompts that are mended
        ("hpsv2", (None, 3), {"resolution": None}, True),
        ("ocr", (None, 2), {"resolution": 64}, True),
    ],
)
def test_a_builtin_reward_that_scores_otherwise_now_is_told_apart(
    two: list[Path],
    name: str,
    revisions: tuple[int | None, int | None],
    asked_at: dict[str, Any],
    refused: bool,
) -> None:
    for path, revision in zip(two, revisions, strict=True):
        of = {} if revision is None else {"revisions": {name: revision}}
        about = {"rewards": {name: None}, "sizes": [], **asked_at, **of}
        says(path, request({}), asked=about)
    found = other_columns(*(json.loads(path.read_text()) for path in two))
    assert found == ([name] if refused else [])
    if refused:
        with pytest.raises(ValueError, match=f"versions .* in which the reward '{name}' scores"):
            told(two, "b,a", None)


def test_a_reward_with_a_name_of_its_own_is_told_apart_by_it(two: list[Path]) -> None:
    """By the name that its column has, for the desk and the report go by columns; also beside an
    evaluation of an earlier version, which did not say what that is."""
    asked_for, file = "mine_called:Own", Path("mine_called.py")
    for path, number in zip(two, "12", strict=True):
        file.write_text(f"class Own:\n    name = 'bright'\n    x = {number}\n")
        says(path, request({asked_for: None}), columns={asked_for: "bright"})
    one, other = (json.loads(path.read_text()) for path in two)
    assert other_columns(one, other) == ["bright"] == other_columns(other, one)
    del one["columns"]
    assert other_columns(one, other) == ["bright"] == other_columns(other, one)
    assert other_columns(one, one) == []


@pytest.mark.parametrize("path", [None, "w"])
def test_code_of_one_size_is_told_apart(two: list[Path], path: str | None) -> None:
    """Also that of a class whose weights lie at a path."""
    name, file = f"mine_same_{path}:f", Path(f"mine_same_{path}.py")
    weights("w", b"0123")
    file.write_text(OWN.format(0.2))
    says(two[0], request({name: path}))
    file.write_text(OWN.format(0.2))
    says(two[1], request({name: path}))
    told(two, "b,a", None)
    file.write_text(OWN.format(0.9))
    says(two[1], request({name: path}))
    with pytest.raises(ValueError, match=f"have the reward '{name}' with other code"):
        told(two, "b,a", None)


def test_what_a_killed_evaluation_goes_on_from_has_the_files_beside(two: list[Path]) -> None:
    Path("taste").mkdir()
    Path("mine_beside.py").write_text(OWN.format(1))
    weights("w", b"0123")
    Path("taste/reward.json").write_text('{"clip": "w"}')
    rewards: dict[str, str | None] = {"taste": None, "mine_beside:f": "w"}
    before, content = asked(request(rewards)), content_of(request(rewards))["rewards"]
    assert list(before["beside"]) == ["taste clip", "mine_beside:f code"]
    assert set(content) == {"taste", "mine_beside:f", *before["beside"]}
    weights("w", b"3210")
    assert asked(request(rewards))["beside"] != before["beside"]
    now = content_of(request(rewards))["rewards"]
    assert [key for key in now if now[key] != content[key]] == ["mine_beside:f", "taste clip"]
    says(two[0], request({"taste": None}), content={"rewards": content})
    says(two[1], request({"taste": None}))
    with pytest.raises(ValueError, match="have the reward 'taste' with other weights"):
        told(two, "b,a", None)
    assert "beside" not in asked(request({"clipscore": None}))


def test_a_reward_that_may_read_other_metadata_is_not_compared(two: list[Path]) -> None:
    Path("mine_about.py").write_text(OWN.format(1))

    def pair(name: str, **changes: Any) -> list[dict[str, Any]]:
        for path, want in zip(two, (0.2, 0.9), strict=True):
            says(path, request({name: None}, {"want": want}), **changes)
        return [json.loads(path.read_text()) for path in two]

    for changes in ({}, {"content": None}):  # earlier versions said it, too
        pair("mine_about:f", **changes)
        with pytest.raises(ValueError, match="other metadata of their prompts, which the reward"):
            told(two, "b,a", None)
        assert other_columns(*pair("mine_about:f", **changes)) == ["mine_about:f"]
        assert other_columns(*pair("clipscore", **changes)) == []
        told(two, "b,a", None)
    assert may_read_metadata("geneval") and may_read_metadata("remote:http://h:1/clipscore")
    assert not may_read_metadata("shapes")


def test_other_noise_is_said(two: list[Path]) -> None:
    plain = request({"clipscore": None})
    for path in two:
        says(path, plain)
    assert "noise" not in told(two, "b,a", None)
    says(two[1], plain, asked=asked(plain) | {"seed": 7})
    assert (
        "the images were made from different noise (seeds 0 and 7): the scores are paired by "
        "prompt alone\n"
    ) in told(two, "b,a", None)
    for path, size in zip(two, (64, [64, 96]), strict=True):
        says(path, plain, asked=asked(plain) | {"resolution": size})
    assert "from different noise (sizes 64 and 64x96): the scores" in told(two, "b,a", None)


@pytest.mark.long
def test_one_model_scored_by_two_clips_of_one_shape(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(resolve_path("packaged:clip"), tmp_path / name)
    file = tmp_path / "two" / "model.safetensors"
    save_file({k: w.flip(0) for k, w in load_file(file).items()}, file, {"format": "pt"})
    prompts, made = load_prompts("shapes-heldout")[:4], []
    for name in ("one", "two"):
        made.append(tmp_path / f"{name}.json")
        rewards: dict[str, str | None] = {"clipscore": str(tmp_path / name)}
        evaluated(
            made[-1],
            Request("packaged:pipeline", prompts, teacher_steps=1, device="cpu", rewards=rewards),
        )
    with pytest.raises(ValueError, match="have the reward 'clipscore' with other weights"):
        told(made, None, None)

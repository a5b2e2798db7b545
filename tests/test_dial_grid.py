"""A dial computed beforehand: its pictures are the live ones, and a killed one goes on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from desk_data import TOKEN, make_tilts, served

from tiltflow.config.load import load_config
from tiltflow.desk.app import Desk
from tiltflow.desk.dial import view
from tiltflow.tasks import dial_grid
from tiltflow.tasks.dial import Student, load_student
from tiltflow.tasks.dial_grid import FILE, Grid, compute_dial, packed, picture_file, read_grid

TEXTS = ["a red circle on white", "<b>two</b> squares"]
STRENGTHS = [0.0, 0.6, 1.0, 1.5]


def compute(run: Path, out: Path, **changes: object) -> Grid:
    given = {"prompts": TEXTS, "seeds": [0, 7], "strengths": STRENGTHS, "device": "cpu"}
    return compute_dial(run, out, **(given | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tilts(tmp_path_factory.mktemp("grid"), 1)[0]


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    """Killed after five pictures, and gone on with."""
    out, image, left = run / "dial", Student.image, [5]

    def dying(self: Student, *given: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return image(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "image", dying)
        with pytest.raises(KeyboardInterrupt):
            compute(run, out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert len(times) == 5 and not list(out.glob("scores-*"))
    compute(run, out)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    return out


@pytest.mark.long
def test_its_pictures_are_the_live_ones(run: Path, folder: Path) -> None:
    grid, student = read_grid(folder), load_student([run], None, "cpu")
    assert len(grid.places()) == 16 == len(list(folder.rglob("*.png")))
    # in another order, and after another student's work, than they were made in
    for prompt, seed, strength in reversed(grid.places()):
        at = [grid.strengths[strength]]
        live = packed(student.image(at, grid.prompts[prompt], grid.seeds[seed], grid.steps))
        assert picture_file(folder, prompt, seed, strength).read_bytes() == live
    assert dial_grid.read_scores(folder, grid) == {
        x: student.scores([x], grid.steps) for x in STRENGTHS
    }


@pytest.mark.long
def test_the_scores_are_of_the_pictures_steps(run: Path, tmp_path: Path) -> None:
    """And one whose scores are of the trained number, as they once were, is not gone on with."""
    out, asked = tmp_path / "dial", {"prompts": TEXTS[:1], "seeds": [0], "strengths": [1.0]}
    grid = compute(run, out, steps=1, **asked)
    student = load_student([run], None, "cpu")
    assert dial_grid.read_scores(out, grid) == {1.0: student.scores([1.0], 1)}
    cfg = student.cfg.model_dump(mode="json", include={"rewards", "watch", "run"})
    plain = {**dial_grid.asked(student.request), **cfg}
    earlier = grid.model_copy(update={"digest": dial_grid.digest({**plain, "steps": 1})})
    (out / FILE).write_text(earlier.model_dump_json())
    with pytest.raises(ValueError, match="holds a dial of another run, settings or versions"):
        compute(run, out, steps=1, **asked)
    trained = student.request.settled.steps  # whose scores were right, and so their digest stays
    kept = compute(run, tmp_path / "trained", **asked)
    assert kept.digest == dial_grid.digest({**plain, "steps": trained})


def test_a_dials_rewards_are_known_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = Path("taste_of_no_dial.py")
    given = ["model.few_step=x", "watch.rewards={'taste_of_no_dial:red': 1.0}"]
    cfg, seen = load_config("demo_tilt", given), []
    for text in ("red = 1", "red = 9", "red = 1"):
        code.write_text(text)
        seen.append(dial_grid._content(cfg))
    assert list(seen[0]) == ["watch"] and seen[0] == seen[2] != seen[1]
    assert dial_grid._content(load_config("demo_tilt", given[:1])) == {}  # of the package's own


@pytest.mark.parametrize("side", [64, (64, 96)])
def test_a_dial_is_read_as_it_was_written(tmp_path: Path, side: int | tuple[int, int]) -> None:
    """Of pictures that are not square it was refused: JSON has lists where there were tuples."""
    grid = Grid(tilt="t", digest="0", steps=4, side=side, strengths=[0.0], prompts=["a"], seeds=[0])
    (tmp_path / FILE).write_text(grid.model_dump_json())
    assert read_grid(tmp_path) == grid
    assert view(tmp_path)["side"] == side


def scored_by_ones_own(run: Path, place: Path) -> tuple[Path, Path]:
    """A copy of the run that was trained on a reward of one's own, and the reward's module."""
    run, code = Path(shutil.copytree(run, place / "own")), place / "taste_of_a_dial.py"
    shutil.rmtree(run / "dial", ignore_errors=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["rewards"] = {"taste_of_a_dial:red": 1.0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    code.write_text(
        "def red(images, prompts, metadata):\n    return 1 * images[:, 0].mean((1, 2))\n"
    )
    return run, code


@pytest.mark.long
def test_a_chart_is_not_gone_on_with_by_another_reward(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where its module has the length that it had."""
    monkeypatch.chdir(tmp_path)
    run, code = scored_by_ones_own(run, tmp_path)
    out, asked = tmp_path / "dial", {"prompts": TEXTS[:1], "seeds": [0], "strengths": [0.0, 1.0]}
    grid = compute(run, out, **asked)
    (out / "scores-00001.json").unlink()
    assert compute(run, out, **asked) == grid
    (out / "scores-00001.json").unlink()
    code.write_text(code.read_text().replace("1 *", "9 *"))
    with pytest.raises(ValueError, match="versions, or of other rewards: choose another --out"):
        compute(run, out, **asked)


@pytest.mark.long
def test_nothing_is_made_twice_or_mixed(run: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "image", None)
        patch.setattr(Student, "scores", None)
        compute(run, folder)
    for change in ({"seeds": [0]}, {"prompts": ["other"]}, {"strengths": [0.0]}, {"steps": 3}):
        with pytest.raises(ValueError, match="holds a dial of another run, settings or versions"):
            compute(run, folder, **change)
    with pytest.raises(ValueError, match="is not empty, and holds no dial"):
        compute(run, run)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"strengths": [0.0, 1.6]}, r"--strengths is (1.6|nan); it goes from 0 .* to 1.5"),
        ({"strengths": [float("nan")]}, r"--strengths is (1.6|nan); it goes from 0 .* to 1.5"),
        ({"strengths": [1.0, 0.0]}, "strengths grow"),
        ({"seeds": [1, 1]}, "a dial needs a seed"),
        ({"seeds": [-1]}, "a dial needs a seed"),
        ({"prompts": []}, "a dial needs a prompt"),
        ({"seeds": range(10_000)}, "20,000 pictures at most, not 80,000"),
    ],
)
def test_numbers_out_of_range_are_refused(
    run: Path, tmp_path: Path, change: dict, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        compute(run, tmp_path / "dial", **change)
    assert not (tmp_path / "dial").exists()


@pytest.mark.long
def test_the_desk_finds_it_and_shows_what_is_there(folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "dial"))
    picture_file(place, 1, 1, 2).unlink()
    (place / "scores-00003.json").unlink()
    with served(Desk([place, folder.parent], tmp_path / "votes.jsonl")) as client:
        first, second = client.json("/api/overview")["dials"]
        about = client.json(f"/api/computed/{first['id']}")
        assert (about["prompts"], about["seeds"], about["of"]) == (TEXTS, [0, 7], 16)
        assert [1, 1, 2] not in about["made"] and len(about["made"]) == 15
        assert about["scores"][3] is None and about["scores"][0]["shapes"]["trained"] is False
        assert len(client.json(f"/api/computed/{second['id']}")["made"]) == 16
        path = f"/api/computed/{first['id']}"
        response, body = client.ask(f"{path}/0/1/3")
        assert response.status == 200 and body == picture_file(folder, 0, 1, 3).read_bytes()
        for missing in ("1/1/2", "9/0/0", f"0/0/{'9' * 300}"):
            assert client.ask(f"{path}/{missing}")[0].status == 404
        assert client.ask("/api/computed/none")[0].status == 404
        assert client.ask(f"{path}/0/1/3", headers={"Cookie": None})[0].status == 401
    assert TOKEN not in (place / FILE).read_text()


@pytest.mark.long
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"strengths": [NaN]}'],
)
def test_a_damaged_dial_is_a_sentence(folder: Path, tmp_path: Path, content: bytes) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "dial"))
    (place / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{place / FILE} is of no dial")):
        read_grid(place)
    shutil.copy(folder / FILE, place / FILE)
    (place / "scores-00000.json").write_bytes(content or b'{"a": {"mean": "x"}}')
    if content == b"{}":
        return  # no reward at all is what a run without rewards has
    with served(Desk([place], tmp_path / "votes.jsonl")) as client:
        (found,) = client.json("/api/overview")["dials"]
        response, said = client.ask(f"/api/computed/{found['id']}")
        assert response.status == 422 and "is of no dial" in json.loads(said)["error"]

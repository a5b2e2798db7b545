"""The dial: what a strength makes is what `tiltflow sample --tilt` makes, and two dials add up."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from desk_data import make_run, make_tilts, served
from PIL import Image

from tiltflow.core.limits import STRONGEST_TILT
from tiltflow.data.prompts import Prompt
from tiltflow.desk import dial as desk_dial
from tiltflow.desk.app import Desk
from tiltflow.desk.sources import Place
from tiltflow.tasks.dial import load_student
from tiltflow.tasks.dial_grid import packed
from tiltflow.tasks.request import Request, prepare

TEXT = "a red circle on white"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_tilts(tmp_path_factory.mktemp("dial"))


@pytest.fixture(scope="module")
def student(runs):
    return load_student(runs, None, "cpu")


@pytest.mark.parametrize("tilt", [0.0, 0.35, 1.0, 1.5])
def test_a_strength_makes_what_sampling_with_it_makes(runs, student, tilt):
    request = Request(
        model="packaged:pipeline",
        prompts=[Prompt(TEXT, {})],
        few_step=runs[0] / "export" / "few_step",
        tilt_lora=runs[0] / "export" / "tilt",
        tilt=tilt,
        seed=5,
        device="cpu",
        cache="off",
    )
    loaded, sampler = prepare(request)
    expected = sampler.few_step(loaded.students["rtdmd"], [0])[0]
    made = student.image([tilt, 0.0], TEXT, 5, request.settled.steps)
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)


def test_dials_are_apart_and_go_back(student):
    at = {s: student.image(s, TEXT, 0, 4) for s in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))}
    images = list(at.values())
    for i, one in enumerate(images):
        assert all((one - other).abs().max() > 1e-3 for other in images[:i])
    student.image((STRONGEST_TILT, STRONGEST_TILT), TEXT, 0, 4)
    assert torch.equal(student.image((0.0, 0.0), TEXT, 0, 4), at[0.0, 0.0])


def test_a_turn_of_the_dial_takes_under_a_second(student):
    """In CPU seconds, which other work on the machine does not lengthen: two dials move, as when
    somebody turns them, and so the adapters are mixed anew each time."""
    took = []
    for turn in range(5):
        began = time.process_time()
        packed(student.image((0.2 * turn, 1 - 0.2 * turn), TEXT, 0, student.request.settled.steps))
        took.append(time.process_time() - began)
    assert sorted(took)[2] < 1, took


def test_scores_are_of_trained_and_held_out_rewards(student):
    found = student.scores([1.0, 0.0], 4)
    assert {name: each["trained"] for name, each in found.items()} == {
        "clipscore": True, "shapes": False, "clipscore_heldout": False
    }  # fmt: skip
    assert all(each["ci95"][0] <= each["mean"] <= each["ci95"][1] for each in found.values())
    assert found == student.scores([1.0, 0.0], 4)
    fewer = student.scores([1.0, 0.0], 1)  # of other images
    assert fewer["clipscore"]["mean"] != found["clipscore"]["mean"]
    for steps in (0, 65):
        with pytest.raises(ValueError, match="steps go from 1 to 64"):
            student.scores([1.0, 0.0], steps)


@pytest.mark.parametrize(
    ("strengths", "seed", "steps", "sentence"),
    [
        ([1.0], 0, 4, "has 2 dials"),
        ([1.6, 0.0], 0, 4, "a dial is 1.6; it goes from 0 .* to 1.5"),
        ([1.0, 0.0], -1, 4, "a seed goes"),
        ([1.0, 0.0], 0, 1000, "steps go"),
    ],
)
def test_numbers_out_of_range_are_refused(student, strengths, seed, steps, sentence):
    with pytest.raises(ValueError, match=sentence):
        student.image(strengths, TEXT, seed, steps)


def test_runs_without_a_tilt_are_refused(tmp_path, runs):
    with pytest.raises(ValueError, match="choose from 1"):
        load_student([], None, "cpu")
    with pytest.raises(ValueError, match="a size goes"):
        load_student(runs, 4, "cpu")
    other = make_run(tmp_path / "other")
    (other / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    with pytest.raises(ValueError, match="has no export yet"):
        load_student([other], None, "cpu")
    with pytest.raises(ValueError, match="runx is no run directory: there is nothing there"):
        load_student([tmp_path / "runx"], None, "cpu")


@pytest.mark.parametrize("file", ["export/few_step/x", "export/tilt/x", "config.yaml"])
def test_a_run_that_was_exported_anew_is_loaded_anew(tmp_path, monkeypatch, file):
    """And the student before it answers nobody any more."""
    loaded = []

    class Fake:
        request = SimpleNamespace(settled=SimpleNamespace(steps=4))

        def image(self, *about):
            return torch.zeros(3, 8, 8)

        def scores(self, strengths, steps):
            return {}

    monkeypatch.setattr(desk_dial, "load_student", lambda *about: loaded.append(1) or Fake())
    monkeypatch.setattr(desk_dial, "facts", lambda student: {})
    for name in ("export/few_step/x", "export/tilt/x", "config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of step 100")
    dial, runs = desk_dial.Dial("cpu"), [Place("id", "tilt", tmp_path)]
    before = dial.load(runs, None)["student"]
    assert dial.load(runs, None)["student"] == before and len(loaded) == 1
    (tmp_path / file).write_text("of step 2000")
    after = dial.load(runs, None)["student"]
    assert after != before and len(loaded) == 2
    asked = {"strengths": [1.0], "prompt": TEXT, "seed": 0, "steps": 4}
    for ask in (dial.image, dial.scores):
        with pytest.raises(ValueError, match="another student"):
            ask(asked | {"student": before})
        assert ask(asked | {"student": after})


def test_the_desk_makes_images_and_refuses_nonsense(runs, tmp_path):
    with served(Desk(runs, tmp_path / "votes.jsonl")) as client:
        asked = {"strengths": [0.5], "prompt": TEXT, "seed": 0, "steps": 4}
        assert client.ask("/api/dial/image", body=asked)[0].status == 422  # nothing is loaded
        ids = [run["id"] for run in client.json("/api/overview")["runs"]]
        about = client.json("/api/dial/load", {"runs": ids[:1], "side": None})
        assert (about["dials"], about["steps"], about["side"]) == (["tilt-0"], 4, 64)
        asked["student"] = about["student"]
        made = client.json("/api/dial/image", asked)
        picture = client.ask(f"/api/dial/picture/{made['picture']}")[1]
        assert np.asarray(Image.open(io.BytesIO(picture))).shape == (64, 64, 3)
        asked["strengths"] = [1.5]
        scores = [client.json("/api/dial/scores", asked | {"steps": n})["scores"] for n in (4, 1)]
        assert scores[0]["clipscore"]["mean"] != scores[1]["clipscore"]["mean"]
        for steps in (None, 0, 2.5, True):
            assert client.ask("/api/dial/scores", body=asked | {"steps": steps})[0].status == 422
        for change in (
            {"student": "x"},
            {"strengths": ["1"]},
            {"strengths": [True]},
            {"strengths": [2]},
            {"prompt": ""},
            {"prompt": "x" * 5000},
            {"seed": 0.5},
            {"steps": 0},
        ):
            assert client.ask("/api/dial/image", body=asked | change)[0].status == 422
        assert client.ask("/api/dial/load", body={"runs": ["x"]})[0].status == 404
        assert client.ask("/api/dial/load", body={"runs": [1]})[0].status == 422

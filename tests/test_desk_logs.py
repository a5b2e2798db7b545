"""The desk over logs and configurations that tiltflow does not write: an odd run hides no other."""

from __future__ import annotations

import json

import pytest
from desk_data import make_run

from tiltflow.desk.app import Desk, Json

LINES = {
    "NaN": '{"step": 50, "x": NaN}',
    "infinite": '{"step": 50, "x": 1e999}',
    "too large for a float": '{"step": 50, "x": 1' + "0" * 400 + "}",
    "a sum beyond the floats": "\n".join(['{"step": 50, "x": 1.7e308}'] * 1200),
    "alarms that are NaN": '{"step": 50, "watch/alarms": NaN}',
    "alarms that are infinite": '{"step": 50, "watch/alarms": 1e999}',
    "alarms that are words": '{"step": 40, "watch/alarms": "many"}',
    "a step that is none": '{"step": true, "x": 1.0}',
    "half a surrogate": r'{"step": 40, "note": "\ud800", "\ud800": 1}',
}


def sent(content: object) -> dict:
    """What the page gets, by JSON's own rules: no NaN."""
    return json.loads(Json(content).body, parse_constant=pytest.fail)


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_that_cannot_be_shown_is_left_out(tmp_path, line):
    odd, good = make_run(tmp_path / "odd"), make_run(tmp_path / "good")
    with (odd / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    desk = Desk([odd, good], tmp_path / "votes.jsonl")
    runs = sent(desk.overview())["runs"]
    assert [(run["name"], run["step"], run["alarms"]) for run in runs] == [
        ("odd", 40, 0),
        ("good", 40, 0),
    ]
    view = sent(desk.view(runs[0]["id"]))
    assert (view["step"], view["curves"]["held_out/shapes"][-1]) == (40, [40, 0.4])


@pytest.mark.parametrize("config", ["stage: .nan\ntrain: {steps: .inf}\n", "train: 5\n"])
def test_a_configuration_of_odd_values_is_shown_as_text(tmp_path, config):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(config)
    desk = Desk([run], tmp_path / "votes.jsonl")
    view = sent(desk.view(sent(desk.overview())["runs"][0]["id"]))
    assert isinstance(view["stage"], str) and view["steps"] is None


def test_half_a_character_in_a_configuration_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text('stage: "\\ud800"\n')
    desk = Desk([run], tmp_path / "votes.jsonl")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        desk.view(sent(desk.overview())["runs"][0]["id"])

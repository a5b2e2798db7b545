"""The desk without a browser: who may ask, what of the files it shows, and how much memory."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import desk_data
import numpy as np
import pytest
from desk_data import ODD, TOKEN, add_lines, make_evaluation, make_run, save_image, served
from PIL import Image

from tiltflow.desk.app import Desk
from tiltflow.desk.runs import POINTS, Curve, Log
from tiltflow.desk.sets import PAGE, Choice, Set, load_table, look
from tiltflow.desk.sources import find_sources
from tiltflow.evaluation.scores import compare
from tiltflow.evaluation.statistics import paired_comparison, verdict


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("desk")
    make_run(place / "runs" / "cold", stage="cold_start")
    run = make_run(place / "runs" / "tilt", rate=3e-4)
    scores = {
        "teacher": [0.1, 0.2, 0.3],
        "ac_dmd": [0.2, 0.2, 0.3],
        "rtdmd": [0.9, 0.1, 0.5],
    }
    make_evaluation(run / "evaluation.json", scores, ODD, ["colours", "counting", "colours"])
    (place / "secret.png").write_bytes((run / "samples" / "step-000000.png").read_bytes())
    return place


@pytest.fixture(scope="module")
def desk(place):
    return Desk([place / "runs"], place / "votes.jsonl")


@pytest.fixture(scope="module")
def client(desk):
    with served(desk) as client:
        yield client


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Cookie": None}, 401),
        ({"Cookie": "tiltflow_desk_1=" + TOKEN}, 401),
        ({"Host": "attacker.example"}, 403),
        ({"Host": "127.0.0.1.attacker.example"}, 403),
        ({"Host": "["}, 400),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this host
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_only_this_page_may_read(client, headers, status):
    assert client.ask("/api/overview", headers)[0].status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": None}, 403),
        ({"Origin": "http://attacker.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({}, 405),  # may write, but not there
    ],
)
def test_only_this_page_may_write(client, headers, status):
    assert client.ask("/api/overview", headers, body={})[0].status == status


def test_the_printed_address_gives_the_cookie(client):
    response, page = client.ask(
        f"/?token={TOKEN}", {"Cookie": None, "Sec-Fetch-Site": "cross-site"}
    )
    assert response.status == 200 and b"tiltflow" in page
    cookie = response.getheader("Set-Cookie")
    assert f"={TOKEN};" in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert client.ask("/?token=wrong", {"Cookie": None})[0].status == 401
    policy = response.getheader("Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert response.getheader("Cross-Origin-Resource-Policy") == "same-origin"


@pytest.mark.parametrize(
    "path",
    [
        "/api/run/nothing",
        "/api/set/nothing",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
        "/api/run/..%2f..%2fsecret.png/sample/0",
        "/api/run/{tilt}/sample/7",
    ],
)
def test_nothing_but_the_named_runs_is_read(client, desk, path):
    ids = {place.name: place.id for place in desk.sources.runs.values()}
    response, said = client.ask(path.format(tilt=ids["tilt"]))
    assert response.status == 404 and b"/" not in said.replace(b"/page", b"")


def test_a_run_in_full(client):
    overview = client.json("/api/overview")
    assert [(run["name"], run["step"]) for run in overview["runs"]] == [("cold", 40), ("tilt", 40)]
    run = client.json(f"/api/run/{overview['runs'][1]['id']}")
    assert run["curves"]["held_out/shapes"][-1] == [40, 0.4]
    assert run["settings"]["train.generator_lr"] == "0.0003"
    assert (run["trained"], run["held_out"]) == (["clipscore"], ["shapes"])
    assert run["samples"] == [0, 40]
    response, small = client.ask(f"/api/run/{run['id']}/sample/40?side=192")
    assert Image.open(io.BytesIO(small)).format == "WEBP"
    tag = response.getheader("ETag")
    again, nothing = client.ask(f"/api/run/{run['id']}/sample/40?side=192", {"If-None-Match": tag})
    assert (again.status, nothing) == (304, b"")
    assert client.ask(f"/api/run/{run['id']}/sample/40?side=5000")[0].status == 422


def test_a_log_is_read_as_it_grows_and_anew_when_it_was_cut(tmp_path):
    run = make_run(tmp_path / "run", steps=20)
    log = Log(run / "metrics.jsonl")
    log.refresh()
    whole = (run / "metrics.jsonl").read_text()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "held_out/sha')
    log.refresh()
    assert log.step == 20
    with (run / "metrics.jsonl").open("a") as file:
        file.write('pes": 0.7}\n{"step": 30, "alarm/drift": "too far"}\n')
    log.refresh()
    assert log.curves["held_out/shapes"].points[-1] == (30, 0.7)
    assert log.notes == [(30, "alarm/drift", "too far")]
    (run / "metrics.jsonl").write_text(whole.split("\n")[0] + "\n")
    log.refresh()
    assert log.curves["held_out/shapes"].points == [(0, 0.0)] and log.notes == []


def test_a_log_in_the_place_of_a_removed_one_is_read_from_its_beginning(tmp_path):
    """File systems give a file's number again as soon as it is free, so it tells nothing."""
    run = tmp_path / "run"
    log = Log(run / "metrics.jsonl")
    for value in (1, 2):
        run.mkdir()
        rows = [{"step": step, "loss": value, f"run {value}": 0} for step in range(10 * value)]
        log.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        log.refresh()
        assert log.curves["loss"].drawn() == [(step, value) for step in range(10 * value)]
        assert set(log.curves) == {"loss", f"run {value}"}
        shutil.rmtree(run)
    log.refresh()
    assert log.curves == {} and log.step == 0  # of a run that has logged nothing yet


def test_a_curve_of_any_length_is_short_and_keeps_the_mean():
    curve = Curve()
    values = np.random.default_rng(0).normal(size=64 * POINTS)
    for step, value in enumerate(values):
        curve.add(step, value)
    assert POINTS <= len(curve.points) < 2 * POINTS
    assert curve.points[-1][0] == len(values) - 1
    assert np.mean([v for _, v in curve.points]) == pytest.approx(values.mean())


def test_a_curve_ends_where_its_log_does():
    curve = Curve()
    for step in range(1, 10_001):
        curve.add(step, float(step))
    assert curve.each == 32 and curve.points[-1][0] == 9984
    assert curve.drawn()[-1] == (10_000, np.mean(range(9985, 10_001)))
    assert curve.drawn()[:-1] == curve.points


def test_the_table_agrees_with_the_statistics(desk):
    place = next(iter(desk.sources.evaluations.values()))
    table = load_table(Set((place,)))
    shown = look(table, Choice("shapes", "ac_dmd", differ=True))
    assert [row["row"] for row in shown["rows"]] == [0, 2, 1]
    assert [row["prompt"] for row in shown["rows"]] == [ODD[0], ODD[2], ODD[1]]
    tilted = next(c for c in shown["columns"] if c["name"] == "rtdmd")
    paired = paired_comparison([0.9, 0.1, 0.5], [0.2, 0.2, 0.3])
    assert tilted["difference"]["difference"] == pytest.approx(paired.difference)
    assert tilted["difference"]["ci95"] == pytest.approx(paired.ci95)
    colours = look(table, Choice("shapes", "teacher", ("rtdmd", "teacher"), "colours"))
    assert colours["count"] == 2
    assert [c["name"] for c in colours["columns"]] == ["teacher", "rtdmd"]
    assert colours["columns"][1]["difference"]["difference"] == pytest.approx(0.5)


def test_what_the_table_calls_higher_is_what_compare_does(tmp_path):
    """Three columns against a baseline: alone one is higher, of three it is not, as everywhere."""
    rng = np.random.default_rng(1)
    base = rng.normal(size=30)
    systems = {"base": base} | {
        name: base + rng.normal(size=30) + shift
        for name, shift in (("a", 0.42), ("b", 0.0), ("c", 0.0))
    }
    prompts = [str(i) for i in range(30)]
    given = {name: values.tolist() for name, values in systems.items()}
    place = make_evaluation(tmp_path / "evaluation.json", given, prompts, images=False)
    desk = Desk([place], tmp_path / "votes.jsonl")
    table = desk.table(desk.overview()["sets"][0]["id"])
    tables = {name: {"shapes": values} for name, values in systems.items()}
    for names in (("a",), ("a", "b", "c")):
        rows = compare(tables, [(name, "base") for name in names], prompts, resamples=10)
        shown = look(table, Choice("shapes", "base", ("base", *names)))["columns"][1:]
        said = [column["difference"] for column in shown]
        assert [one["p_holm"] for one in said] == [row["p_holm"] for row in rows]
        assert [one["verdict"] for one in said] == [verdict(row) for row in rows]
        assert (said[0]["verdict"] == "higher") == (names == ("a",))
        assert said[0]["ci95"][0] > 0


def test_evaluations_are_together_only_on_the_same_noise(tmp_path):
    prompts = ["a", "b", "c"]
    same, new = {"teacher": [0.1, 0.2, 0.4]}, {"rtdmd": [0.5, 0.6, 0.6]}
    make_evaluation(tmp_path / "a" / "evaluation.json", same | new, prompts)
    make_evaluation(tmp_path / "b" / "evaluation.json", same | {"rtdmd": [0.1, 0.1, 0.3]}, prompts)
    make_evaluation(tmp_path / "c" / "evaluation.json", same | new, prompts, seed=1)
    desk = Desk([tmp_path / name for name in "abc"], tmp_path / "votes.jsonl")
    sets = desk.overview()["sets"]
    assert [each["name"] for each in sets] == ["a, b", "c"]
    columns = [column.name for column in desk.table(sets[0]["id"]).columns]
    assert columns == ["teacher", "rtdmd, a", "rtdmd, b"]


@pytest.mark.parametrize(
    "query",
    ["?reward=none&baseline=ac_dmd", "?reward=shapes&baseline=x", "?reward=shapes&baseline=ac_dmd"
     "&page=-1", "?reward=shapes&baseline=ac_dmd&systems=[[1]]", "?reward=shapes&baseline=ac_dmd"
     "&systems={", "?reward=shapes&baseline=ac_dmd&page=x"],
)  # fmt: skip
def test_a_wrong_question_is_answered_in_a_sentence(client, query):
    key = client.json("/api/overview")["sets"][0]["id"]
    response, said = client.ask(f"/api/set/{key}/rows{query}")
    assert response.status == 422 and json.loads(said)["error"]


def test_a_place_without_anything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds nothing for a desk"):
        find_sources([tmp_path])


def test_ten_thousand_samples_and_fifty_runs(tmp_path):
    for i in range(50):
        add_lines(make_run(tmp_path / "runs" / f"run-{i:02d}", steps=10), range(11, 500))
    n, rng = 10_000, np.random.default_rng(0)
    scores = {name: rng.random(n).tolist() for name in ("teacher", "rtdmd")}
    prompts = [f"prompt {i}" for i in range(n)]
    file = tmp_path / "runs" / "run-00" / "evaluation.json"
    make_evaluation(file, scores, prompts, images=False)
    for i in range(50):
        desk_data.save_image(file.with_suffix(".images") / "rtdmd" / f"{i:05d}.png", (i, 0, 0), 256)
    with served(Desk([tmp_path / "runs"], tmp_path / "votes.jsonl")) as client:
        began = time.perf_counter()
        overview = client.json("/api/overview")
        client.json(f"/api/run/{overview['runs'][-1]['id']}")
        assert time.perf_counter() - began < 1
        address = f"/api/set/{overview['sets'][0]['id']}"
        query = "reward=shapes&baseline=teacher&order=differ"
        assert len(client.json(f"{address}/rows?{query}")["rows"]) == PAGE
        for run in overview["runs"]:
            client.json(f"/api/run/{run['id']}")
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for page in range(5):
                client.json("/api/overview")
                client.json(f"{address}/rows?{query}&page={page}")
                client.ask(f"{address}/image/rtdmd/{page}?side=192")
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < 2_000_000


def test_a_vote_of_odd_systems_hides_no_other(tmp_path):
    run = make_run(tmp_path / "run")
    make_evaluation(run / "evaluation.json", {"a": [0.1], "b": [0.2]}, ["one"])
    desk = Desk([run], tmp_path / "votes.jsonl")
    match = {"set": desk.overview()["sets"][0]["id"], "a": "a", "b": "b"}
    plain = {"prompt": "one", "image_a": "x.png", "image_b": "y.png", "choice": "a", "row": 0}
    rows = [
        {**plain, "set": match["set"], "system_a": odd, "system_b": "b"} for odd in ([], {}, "a", 3)
    ]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served(desk) as client:
        tally = client.json("/api/pair", match)["tally"]
    assert (tally["wins"], tally["losses"]) == (1, 0)


@pytest.mark.parametrize("folder", ["samples", "checkpoints"])
def test_the_pace_is_that_of_the_latest_files(tmp_path, folder):
    """Also of a run that draws no samples, as on the mixture."""
    run = make_run(tmp_path / "run")
    if folder == "checkpoints":
        shutil.rmtree(run / "samples")
        for step in (0, 40):
            (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (run / "checkpoints" / "latest").symlink_to("step-000040")
    for number, file in enumerate(sorted((run / folder).glob("step-*"))):
        os.utime(file, (1000 + 80 * number,) * 2)
    os.utime(run / "metrics.jsonl", (1080, 1080))
    desk = Desk([run], tmp_path / "votes.jsonl")
    assert desk.view(desk.overview()["runs"][0]["id"])["seconds_per_step"] == 2


def test_a_night_between_two_samples_makes_no_slow_run(tmp_path):
    """Killed after step 60, gone on with twelve hours later: two seconds a step on both days."""
    run = make_run(tmp_path / "run", steps=60)
    for step, at in ((0, 0), (20, 40), (40, 80), (60, 120)):
        save_image(run / "samples" / f"step-{step:06d}.png", (step, 0, 0))
        os.utime(run / "samples" / f"step-{step:06d}.png", (1000 + at,) * 2)
    add_lines(run, [70])
    os.utime(run / "metrics.jsonl", (1140 + 43200,) * 2)
    desk = Desk([run], tmp_path / "votes.jsonl")
    assert desk.view(desk.overview()["runs"][0]["id"])["seconds_per_step"] == 2


def test_a_run_that_this_user_may_only_read_or_not_even_that_hides_no_other(tmp_path, monkeypatch):
    """Tests may run as root, whom no mode stops: so the system's refusals are made."""
    for name in ("locked", "mine", "secret"):
        make_run(tmp_path / name)
    holder = {"host": "other", "pid": 5, "started": "1", "space": "x", "token": "t"}
    (tmp_path / "locked" / "run.lock").write_text(json.dumps(holder))
    (tmp_path / "closed").mkdir()
    touch, stat = Path.touch, os.stat

    def refuse(path: Path, *given: object, **more: object) -> None:
        if path.parent.name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied")
        touch(path, *given, **more)

    def closed(path: object, *given: object, **more: object) -> os.stat_result:
        if "/closed/" in str(path) or str(path).endswith("secret/metrics.jsonl"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, *given, **more)

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(os, "stat", closed)
    overview = Desk([tmp_path], tmp_path / "votes.jsonl").overview()
    assert [run["name"] for run in overview["runs"]] == ["locked", "mine"]
    assert overview["runs"][0]["running"]  # its lock is a moment old
    assert overview["problems"] == ["secret: Permission denied"]

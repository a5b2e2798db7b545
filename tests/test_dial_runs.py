"""Several runs in one dial: the rewards of all, by whom they were trained on, and one sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from desk_data import make_tilts

from tiltflow.config.load import RunConfig, load_config
from tiltflow.data.prompts import Prompt
from tiltflow.tasks import dial_runs
from tiltflow.tasks.dial import Student, facts, load_student
from tiltflow.tasks.dial_runs import Exam, check_alike, plan_exams
from tiltflow.tasks.request import Request, prepare

TEXT = "a red circle on white"
A = ["rewards={clipscore: 1.0}", "watch.rewards={shapes: 1.0}"]
B = ["rewards={clipscore_heldout: 1.0}", "watch.rewards={clipscore: 2.0}"]
OTHER_ETA = [*B, "sampler.eta=0.2"]


@cache
def config(*changes: str) -> RunConfig:
    return load_config("demo_tilt", ["model.few_step=x", *changes])


def planned(*changes: Sequence[str]) -> list[Exam]:
    return plan_exams(["A", "B", "C"][: len(changes)], [config(*each) for each in changes])


def names(exam: Exam) -> tuple[list[str], list[str]]:
    return list(exam.trained), list(exam.held_out)


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the thousands that are drawn anew for each configuration."""

    def read(cfg: RunConfig) -> SimpleNamespace:
        return SimpleNamespace(fixed=[Prompt(f"{cfg.data.eval_prompts} {i}") for i in range(20)])

    monkeypatch.setattr(dial_runs, "read_prompts", read)


@pytest.mark.usefixtures("few_prompts")
def test_the_rewards_are_those_of_all_runs() -> None:
    (one,) = planned(A, B)
    assert names(one) == (["clipscore", "clipscore_heldout"], ["shapes"])
    (other,) = planned(B, A)
    assert names(other) == (["clipscore_heldout", "clipscore"], ["shapes"])
    (alone,) = planned(B)
    assert names(alone) == (["clipscore_heldout"], ["clipscore"])
    assert names(planned(A, A)[0]) == names(planned(A)[0]) == (["clipscore"], ["shapes"])


@pytest.mark.usefixtures("few_prompts")
def test_a_reward_is_scored_on_the_prompts_of_a_run_that_has_it() -> None:
    """The prompts of another may be none that it can read."""
    ours, theirs = planned(A, [*B, "data.eval_prompts=shapes-train"])
    assert names(ours) == (["clipscore"], ["shapes"]) and names(theirs)[0] == ["clipscore_heldout"]
    assert len(ours.prompts) == len(theirs.prompts) == 16 and ours.prompts != theirs.prompts
    # of a file that is sorted by what it asks for, no part is left out
    numbers = sorted(int(prompt.text.split()[-1]) for prompt in ours.prompts)
    assert max(b - a for a, b in zip([-1, *numbers], [*numbers, 20], strict=True)) == 2
    seeds = [exam.seed for exam in planned(A, [*B, "run.seed=7"])]
    assert seeds == [config().run.seed, 7]
    without = ["rewards={clipscore: 1.0}", "watch.rewards={}", "run.seed=7"]
    assert len(planned(A, without)) == 1  # nothing of it is left to score


@pytest.mark.usefixtures("few_prompts")
def test_other_rewards_of_one_name_are_refused_or_apart() -> None:
    other = "{clipscore: {weight: 1, path: packaged:clip_heldout}}"
    sentence = "A and C have the reward 'clipscore' with different paths or options: dial them one"
    with pytest.raises(ValueError, match=sentence):
        planned(A, B, [f"rewards={other}", A[1]])
    with pytest.raises(ValueError, match="B and C have the reward 'clipscore'"):
        planned(A, B, [A[0], f"watch.rewards={other}"])
    (apart,) = planned(A, [B[0], f"watch.rewards={other}"])
    assert "clipscore" in apart.trained and "clipscore" in apart.held_out


SETTLED = SimpleNamespace(
    steps=4, eta=0.9, guidance=1.0, resolution=64, max_sequence_length=8, dtype="fp32",
    vae_dtype=None, levels={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 2}, "steps 4 and 2"),
        ({"eta": 0.2, "guidance": 2.0}, r"η 0.9 and 0.2; guidance 1.0 and 2.0"),
        ({"resolution": (64, 32)}, "size 64 and 64x32"),
        ({"max_sequence_length": 16}, "text tokens 8 and 16"),
        ({"dtype": "bf16"}, "dtype fp32 and bf16"),
        ({"vae_dtype": "bf16"}, "autoencoder's dtype fp32 and bf16"),
        ({"levels": {"64": (1.0, 0.0)}}, "noise levels"),
        ({"model": "other"}, "model m and other"),
        ({"generator_path": "x"}, "generator None and x"),
        ({"family": "sd3"}, "family None and sd3"),
        ({"autocast": "bf16"}, "autocast None and bf16"),
    ],
)
def test_runs_that_are_sampled_differently_are_refused(change: dict, sentence: str) -> None:
    def request(change: dict) -> SimpleNamespace:
        top = {"model": "m", "generator_path": None, "family": None, "autocast": None}
        own = {key: change[key] for key in change if key in top}
        settled = {key: change[key] for key in change if key not in top}
        return SimpleNamespace(**top | own, settled=SimpleNamespace(**vars(SETTLED) | settled))

    check_alike(["A", "B"], [request({}), request({})])
    said = rf"A and B are sampled differently \(.*{sentence}.*\): dial them one by one"
    with pytest.raises(ValueError, match=said):
        check_alike(["A", "C", "B"], [request({}), request({}), request(change)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_tilts(tmp_path_factory.mktemp("runs"), changes=[A, B, OTHER_ETA])


@pytest.fixture(scope="module")
def student(runs: list[Path]) -> Student:
    return load_student(runs[:2], None, "cpu")


@pytest.mark.long
def test_each_rewards_mark_is_by_the_runs_that_trained_on_it(student: Student) -> None:
    about = facts(student)
    assert about["trained"] == {"clipscore": (0,), "clipscore_heldout": (1,)}
    assert about["held_out"] == ["shapes"] and len(about["prompts"]) == 16
    found = student.scores([0.0, 1.0], 1)
    assert {name: each["trained"] for name, each in found.items()} == {
        "clipscore": True, "clipscore_heldout": True, "shapes": False
    }  # fmt: skip


@pytest.mark.long
def test_the_scores_are_those_of_the_run_alone(runs: list[Path], student: Student) -> None:
    alone = load_student(runs[1:2], None, "cpu")
    both, one = student.scores([0.0, 1.0], 2), alone.scores([1.0], 2)
    assert one["clipscore_heldout"]["trained"] and not one["clipscore"]["trained"]
    for name in one:
        assert both[name]["mean"] == pytest.approx(one[name]["mean"], abs=1e-4)


@pytest.mark.long
def test_runs_of_another_eta_are_refused_and_make_their_own_picture_alone(
    runs: list[Path],
) -> None:
    for pair in (runs[1:], runs[:0:-1]):
        with pytest.raises(ValueError, match=r"tilt-\d and tilt-\d are sampled differently \(η 0"):
            load_student(pair, None, "cpu")
    request = Request(
        model="packaged:pipeline",
        prompts=[Prompt(TEXT)],
        few_step=runs[2] / "export" / "few_step",
        tilt_lora=runs[2] / "export" / "tilt",
        device="cpu",
        cache="off",
    )
    loaded, sampler = prepare(replace(request, seed=5))
    expected = sampler.few_step(loaded.students["rtdmd"], [0])[0]
    made = load_student(runs[2:], None, "cpu").image([1.0], TEXT, 5, 4)
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)


@pytest.mark.long
def test_two_rewards_that_call_themselves_alike_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On held-out prompts of their own, the figures of one stood in the place of the other's."""
    monkeypatch.chdir(tmp_path)
    runs = make_tilts(tmp_path, 2)
    for number, run in enumerate(runs):
        (tmp_path / f"warm_{number}.py").write_text(
            "class Warm:\n    name, differentiable = 'warm', False\n"
            "    def __init__(self, device):\n        pass\n"
            "    def __call__(self, images, prompts, metadata):\n"
            f"        return {number} + images[:, 0].mean((1, 2))\n"
        )
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["rewards"] = {f"warm_{number}:Warm": 1.0}
        config["run"]["seed"] = number
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="rewards of these runs call themselves 'warm': dial them"):
        load_student(runs, None, "cpu")

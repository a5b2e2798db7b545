"""Terms of stage 2 and objectives of stage 1 from outside the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from rich.console import Console
from short_runs import SHORT, cold_start, tilt
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core import registry
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.errors import NonFiniteError
from tiltflow.method.boundary import Boundary
from tiltflow.method.rollout import log_prob
from tiltflow.setup.build import build_stage
from tiltflow.tasks.train import run_training
from tiltflow.training.loop import Skips
from tiltflow.training.parts import Parts
from tiltflow.training.terms import Attached, Epoch, Loss, Span, Term, single
from tiltflow.training.tilt import Tilt

EXAMPLES = Path(__file__).parents[1] / "examples"
STAY = "tilt.terms={own_term:Stay: {weight: %s}}"


@pytest.fixture(scope="module")
def examples() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cold_start(tmp_path_factory.mktemp("cold"))


def rows(out: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_term_from_outside_trains_and_resumes(examples: None, cold: Path, tmp_path: Path) -> None:
    plain = tilt(tmp_path / "plain", cold)
    whole = tilt(tmp_path / "whole", cold, STAY % 50.0)
    assert not same(plain, whole)
    gaps = rows(tmp_path / "whole", "generator/stay")
    assert len(gaps) == 4 and gaps[-1] > 0
    assert same(plain, tilt(tmp_path / "off", cold, STAY % 0.0))
    tilt(tmp_path / "parts", cold, STAY % 50.0, "train.steps=2")
    resumed = tilt(tmp_path / "parts", cold, STAY % 50.0, "run.resume=true")
    assert same(whole, resumed)


def test_a_term_is_found_by_entry_point(
    examples: None, cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("stay", "own_term:Stay", "tiltflow.terms")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] * (group == point.group))
    named = tilt(tmp_path / "a", cold, "tilt.terms={stay: {weight: 50.0}}")
    assert same(named, tilt(tmp_path / "b", cold, STAY % 50.0))


class Loose:
    """No term."""

    def __init__(self, parts: Parts) -> None:
        raise AssertionError("made")


class Forward(Term):
    """A term that calls the network itself, at the rollout's end re-noised to σ = 1/2."""

    name = "the forward term"

    def __init__(self, parts: Parts, weight: float) -> None:
        self.parts, self.weight = parts, weight

    def spans(self, step: int) -> tuple[Span, ...]:
        return (Span(self.parts.steps, self.parts.steps),)

    def begin(self, epoch: Epoch) -> Loss:
        def loss(at: Attached) -> tuple[Tensor, dict[str, Tensor]]:
            assert not at.x.requires_grad and torch.equal(at.x, at.part.end)
            half = at.x.new_full((len(at.x),), 0.5)
            v = self.parts.roles.generator(0.5 * at.x, half, at.part.conditioning)
            return self.weight * v.square().flatten(1).mean(1), {}

        return loss


def test_a_term_may_call_the_networks_itself(cold: Path, tmp_path: Path) -> None:
    none = ["tilt.policy_weight=0", "tilt.matching_weight=0"]
    terms = "tilt.terms={test_own_terms:Forward: {weight: 1.0}}"
    one = tilt(tmp_path / "a", cold, *none, "tilt.reward_weight=1e-9", terms)
    two = tilt(
        tmp_path / "b", cold, *none, "tilt.reward_weight=1e-9", terms, "train.micro_batch_size=4"
    )
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-6)
    assert not same(one, tilt(tmp_path / "c", cold, *none, "tilt.reward_weight=1e-9"))


class Checks(Forward):
    """Sees a number that is not finite in the second micro-batch of epoch 1."""

    def begin(self, epoch: Epoch) -> Loss:
        right = super().begin(epoch)

        def loss(at: Attached) -> tuple[Tensor, dict[str, Tensor]]:
            if epoch.step == 1 and at.rows.start > 0:
                raise NonFiniteError("step 1: my own check")
            return right(at)

        return loss


def test_a_terms_own_check_passes_an_epoch_over_whole(cold: Path, tmp_path: Path) -> None:
    terms = "tilt.terms={test_own_terms:Checks: {weight: 1.0}}"
    chosen = [f"run.out={tmp_path}", f"model.few_step={cold}", *SHORT, "tilt.group_size=4", terms]
    stage = build_stage(load_config("mixture_tilt", [*chosen, "train.micro_batch_size=4"])).stage
    skips = Skips(1)
    assert skips.iteration(stage, 0) and not skips.iteration(stage, 1) and skips.count == 1
    for updater in stage.updaters.values():
        assert all(p.grad is None for p in updater.parameters)


class Explorer(Term):
    """A policy gradient of every stochastic step, with the rewards' own gradient beside it."""

    name = "the explorer"
    takes_gradient = True

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def explores(self, step: int) -> tuple[int, ...]:
        return tuple(range(self.parts.steps - 1))

    def spans(self, step: int) -> tuple[Span, ...]:
        return (*map(single, self.explores(step)), single(self.parts.steps - 1))

    def begin(self, epoch: Epoch) -> Loss:
        path, pull = epoch.trajectory, epoch.scored.gradient
        assert sorted(path.log_probs) == [0, 1, 2] and pull is not None

        def loss(at: Attached) -> tuple[Tensor, dict[str, Tensor]]:
            k = at.span.first
            if k == self.parts.steps - 1:
                return (at.x * pull[at.rows]).flatten(1).sum(1), {}
            now = log_prob(at.part.states[k + 1], at.mean, at.std, "unit")
            ratio = torch.exp(now - at.part.log_probs[k])
            noise = (at.part.states[k + 1] - at.mean) / at.std
            assert not torch.allclose(noise[0], noise[1])  # two members of one group
            return -ratio * epoch.advantages[at.rows], {}

        return loss


def test_a_term_may_explore_every_step_and_take_the_rewards_gradient(
    cold: Path, tmp_path: Path
) -> None:
    none = ["tilt.policy_weight=0", "tilt.matching_weight=0", "tilt.reward_weight=0"]
    own = [*none, "tilt.terms={test_own_terms:Explorer: {}}"]
    one = tilt(tmp_path / "a", cold, *own)
    assert not same(one, dict(load_checkpoint(cold).tensors["generator"]))
    with pytest.raises(ValueError, match="takes the rewards' gradient, but no reward"):
        tilt(tmp_path / "c", cold, *own, "rewards.linear={weight: 1.0, backprop: false}")


def test_a_normalised_pull_runs_the_last_step_once(cold: Path) -> None:
    chosen = [f"model.few_step={cold}", *SHORT, "tilt.group_size=4"]
    chosen += ["tilt.reward_normalise=true", "tilt.match_steps=last"]
    stage = build_stage(load_config("mixture_tilt", chosen)).stage
    assert isinstance(stage, Tilt)
    last = [term.spans(0) for term in stage.terms[1:]]
    assert last == [(single(3),), (single(3),)]


def test_an_objective_from_outside_trains_stage_1(examples: None, tmp_path: Path) -> None:
    found = {}
    for name, more in {
        "ac_dmd": [],
        "own": ["cold_start.objective=own_objective:Difference"],
        "none": [
            "cold_start.objective=own_objective:Difference",
            "cold_start.objective_options={scale: 0.0}",
        ],
    }.items():
        chosen = [f"run.out={tmp_path / name}", *SHORT, "cold_start.generator_every=2", *more]
        run_training(load_config("mixture_cold_start", chosen), Console())
        found[name] = dict(load_checkpoint(tmp_path / name).tensors["generator"])
    assert not same(found["ac_dmd"], found["own"]) and not same(found["own"], found["none"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("tilt.terms={stayy: {}}", "there is no term 'stayy'"),
        ("tilt.terms={own_term:Stayy: {}}", "term 'own_term:Stayy': 'own_term' has no 'Stayy'"),
        (STAY % -1.0, "term 'own_term:Stay': weight is -1.0, but it should be greater than"),
        (STAY % "false", "term 'own_term:Stay': weight is False, but it should be a valid number"),
        ("tilt.terms={own_term:Stay: {}}", "term 'own_term:Stay': weight is not set"),
        (
            "tilt.terms={own_term:Stay: {weight: 1, wait: 1}}",
            "term 'own_term:Stay': it has no setting wait",
        ),
        ("tilt.terms={test_own_terms:Forward: {wait: 1}}", "term 'test_own_terms:Forward': .*'w"),
        ("tilt.terms={json:JSONDecoder: {}}", "'json:JSONDecoder'.* 'parts'"),
        ("tilt.terms={test_own_terms:Loose: {}}", "does not derive from .*Term"),
        ("tilt.terms={json:dumps: {}}", "term 'json:dumps' should be a class"),
    ],
)
def test_what_is_no_term_says_one_sentence(
    examples: None, cold: Path, tmp_path: Path, setting: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        tilt(tmp_path / "run", cold, setting)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_what_is_no_objective_says_one_sentence(tmp_path: Path) -> None:
    for more, said in (
        (["cold_start.objective=dmd"], "there is no objective 'dmd'"),
        (["cold_start.objective_options={a: 1}"], "ac_dmd takes none"),
    ):
        with pytest.raises(ValueError, match=said):
            chosen = [f"run.out={tmp_path / 'run'}", *SHORT, *more]
            run_training(load_config("mixture_cold_start", chosen), Console())


def test_the_examples_run(examples: None, tmp_path: Path) -> None:
    import own_objective  # type: ignore[import-not-found]
    import own_term  # type: ignore[import-not-found]

    own_objective.main(tmp_path / "objective", *SHORT)
    own_term.main(tmp_path / "term", *(s for s in SHORT if "batch" not in s), "train.batch_size=16")
    assert rows(tmp_path / "term" / "tilt", "generator/stay")
    for page in ("own_term", "own_objective"):
        assert len((EXAMPLES / f"{page}.py").read_text().splitlines()) <= 60


class Odd(Forward):
    """Losses of another form than a term's."""

    def __init__(self, parts: Parts, weight: float, form: str) -> None:
        super().__init__(parts, weight)
        self.form = form

    def begin(self, epoch: Epoch) -> Loss:
        right = super().begin(epoch)
        forms = {
            "one number": lambda losses: (losses.mean(), {}),
            "detached": lambda losses: (losses.detach(), {}),
            "losses alone": lambda losses: losses,
            "nothing": lambda losses: None,
        }
        return lambda at: forms[self.form](right(at)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["one number", "detached", "losses alone", "nothing"])
def test_a_loss_of_another_form_is_refused(cold: Path, tmp_path: Path, form: str) -> None:
    terms = f"tilt.terms={{test_own_terms:Odd: {{weight: 1.0, form: {form}}}}}"
    with pytest.raises(ValueError, match="the forward term: a term's loss gives .losses, figures"):
        tilt(tmp_path, cold, terms)


class Flat:
    """A gradient of one row for all samples, or none."""

    def __init__(self, parts: Parts, rows: int) -> None:
        self.rows = rows

    def gradient(self, stream: str, draw: int, at: Boundary) -> Tensor:
        return at.x[: self.rows] if self.rows else None  # type: ignore[return-value]


@pytest.mark.parametrize(("rows", "said"), [(1, r"\(1, 2\)"), (0, "NoneType")])
def test_a_gradient_of_another_shape_is_refused(tmp_path: Path, rows: int, said: str) -> None:
    options = f"cold_start.objective_options={{rows: {rows}}}"
    chosen = [
        f"run.out={tmp_path}", *SHORT, "cold_start.generator_every=1",
        "cold_start.objective=test_own_terms:Flat", options,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=f"objective Flat: its gradient is {said}, where a tensor"):
        run_training(load_config("mixture_cold_start", chosen), Console())

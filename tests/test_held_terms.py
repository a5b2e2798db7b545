"""Code from outside that is amiss: an error that names it, never another number in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from short_runs import SHORT, cold_start, tilt
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.errors import NonFiniteError
from tiltflow.core.interruption import Stopped
from tiltflow.method.boundary import Boundary
from tiltflow.tasks.train import train_run
from tiltflow.training.own import guarded
from tiltflow.training.own_terms import most_passes
from tiltflow.training.parts import Parts
from tiltflow.training.terms import Attached, Epoch, Loss, Span, Term, single


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cold_start(tmp_path_factory.mktemp("cold"))


def raising(*given: object) -> object:
    raise KeyError("oh")


def written(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(0.5)


Spans = Callable[[int], object]
SPANS: dict[str, Spans] = {
    "raises": raising,
    "a number": lambda step: 3,
    "nothing": lambda step: None,
    "numbers": lambda step: (1, 2),
    "a span alone": lambda step: single(1),
    "beyond": lambda step: [Span(3, 5)],
    "halves": lambda step: [Span(0, 0.5)],  # type: ignore[arg-type]
}
EXPLORES: dict[str, Spans] = {
    "explores raises": raising,
    "explores text": lambda step: "ab",
    "explores the last": lambda step: (3,),
    "explores nothing": lambda step: None,
}


def backward(losses: Tensor) -> None:
    losses.mean().backward(retain_graph=True)


BEGINS: dict[str, Callable[[Epoch], object]] = {
    "begin raises": raising,
    "begin ends the process": lambda epoch: (_ for _ in ()).throw(SystemExit(3)),
    "begin gives nothing": lambda epoch: None,
    "begin writes a state": lambda epoch: written(epoch.trajectory.states[1]),
    "begin writes advantages": lambda epoch: written(epoch.advantages),
    "begin writes scores": lambda epoch: written(*epoch.scored.scores.values()),
}


def ones(losses: Tensor, **more: object) -> object:
    return losses, {"generator/own": losses.detach()} | more


LOSSES: dict[str, Callable[[Attached, Tensor, int], object]] = {
    "raises in its loss": raising,
    "writes x": lambda at, losses, call: (written(at.x), ones(losses))[1],
    "writes the mean": lambda at, losses, call: (written(at.mean), ones(losses))[1],
    "writes a part": lambda at, losses, call: (written(at.part.states[1]), ones(losses))[1],
    "detached once": lambda at, losses, call: ones(losses if call else losses.detach()),
    "complex": lambda at, losses, call: ones(losses.to(torch.complex64)),
    "a figure of another form": lambda at, losses, call: ones(losses, other=torch.zeros(3)),
    "a figure that is a number": lambda at, losses, call: ones(losses, other=0.5),
    "a reward's figure": lambda at, losses, call: (losses, {"reward/linear": losses}),
    "a term's figure": lambda at, losses, call: (losses, {"generator/matching": losses}),
    "calls backward": lambda at, losses, call: (backward(losses), ones(losses))[1],
    "calls backward later": lambda at, losses, call: (call and backward(losses), ones(losses))[1],
    "the key of a step": lambda at, losses, call: (losses, {"step": losses}),
}


class Own(Term):
    """A term that is amiss in one way."""

    name = "the own term"

    def __init__(self, parts: Parts, how: str) -> None:
        self.how, self.calls, self.weights = how, 0, parts.roles.fake_score.parameters

    @classmethod
    def passes(cls, steps: int, **settings: object) -> int:
        return raising() if settings["how"] == "raises" else "three"  # type: ignore[return-value]

    def explores(self, step: int) -> tuple[int, ...]:
        return EXPLORES.get(self.how, lambda step: ())(step)  # type: ignore[return-value]

    def spans(self, step: int) -> tuple[Span, ...]:
        return SPANS.get(self.how, lambda step: (single(1),))(step)  # type: ignore[return-value]

    def begin(self, epoch: Epoch) -> Loss:
        if self.how in BEGINS:
            return BEGINS[self.how](epoch)  # type: ignore[return-value]

        def loss(at: Attached) -> tuple[Tensor, dict[str, Tensor]]:
            losses = at.mean.square().flatten(1).mean(1)
            if self.how == "writes weights":
                with torch.no_grad():
                    written(*self.weights.values())
            made = LOSSES.get(self.how, lambda at, losses, call: ones(losses))
            self.calls += 1
            return made(at, losses, self.calls - 1)  # type: ignore[return-value]

        return loss


def chosen(how: str) -> str:
    return f"tilt.terms={{test_held_terms:Own: {{how: {how}}}}}"


@pytest.mark.parametrize("how", [*SPANS, *EXPLORES, *BEGINS, *LOSSES, "writes weights"])
def test_an_own_term_that_is_amiss_is_named(cold: Path, tmp_path: Path, how: str) -> None:
    with pytest.raises(ValueError, match="^the own term: "):
        tilt(tmp_path, cold, chosen(how), "train.micro_batch_size=4", "tilt.subset=3")


class Generator(Own):
    """Its spans can be gone through once."""

    def spans(self, step: int) -> Iterator[Span]:  # type: ignore[override]
        return (single(k) for k in (1, 1))


def test_spans_that_can_be_read_once_train_as_a_tuple_does(cold: Path, tmp_path: Path) -> None:
    plain, whole = tilt(tmp_path / "plain", cold), tilt(tmp_path / "whole", cold, chosen("right"))
    once = tilt(tmp_path / "once", cold, chosen("right").replace("Own", "Generator"))
    assert any(not torch.equal(plain[name], whole[name]) for name in plain)
    assert all(torch.equal(once[name], whole[name]) for name in whole)


class Nameless(Own):
    name = None  # type: ignore[assignment]


def test_a_term_without_a_name_and_passes_that_are_no_count(cold: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="term 'test_held_terms:Nameless' has no `name`"):
        tilt(tmp_path, cold, chosen("right").replace("Own", "Nameless"))
    for how, said in (("raises", "KeyError: 'oh'"), ("text", "gives 'three', which is no count")):
        with pytest.raises(ValueError, match=f"term 'test_held_terms:Own': .*{said}"):
            most_passes({"test_held_terms:Own": {"how": how}}, 4)


class Follows:
    """An objective that is amiss in one way."""

    def __init__(self, parts: Parts, how: str) -> None:
        self.how, self.roles = how, parts.roles

    def gradient(self, stream: str, draw: int, at: Boundary) -> Tensor:
        if self.how == "raises":
            raise KeyError("oh")
        if self.how == "backward":
            with torch.enable_grad():
                self.roles.generator(at.x, at.s, at.conditioning).mean().backward()
        return at.x.mul_(0.5) if self.how == "writes" else at.x.long()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "KeyError: 'oh'"),
        ("writes", "it has written into"),
        ("whole", "int64 on cpu"),
        ("backward", "it has called backward"),
    ],
)
def test_an_own_objective_that_is_amiss_is_named(tmp_path: Path, how: str, said: str) -> None:
    own = ["cold_start.objective=test_held_terms:Follows"]
    own += [f"cold_start.objective_options={{how: {how}}}", "cold_start.generator_every=1"]
    with pytest.raises(ValueError, match=f"^objective Follows: .*{said}"):
        train_run(load_config("mixture_cold_start", [f"run.out={tmp_path}", *SHORT, *own]))


@pytest.mark.parametrize(
    "error", [Stopped(), NonFiniteError("nan"), MemoryError(), KeyboardInterrupt()]
)
def test_what_ends_a_run_by_itself_passes_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, guarded("own"):
        raise error
    assert raised.value is error


def test_spans_have_one_order_whatever_that_of_their_set() -> None:
    """A bounded span and another of the same steps: the hash of None is each process's own."""
    spans = [single(1), Span(2, 4, 0.5), Span(2, 4), Span(2, 4, 0.25), Span(1, 4)]
    ordered = sorted(spans, key=lambda span: span.place)
    assert ordered == sorted(spans[::-1], key=lambda span: span.place)
    assert [(s.first, s.bound) for s in ordered[1:4]] == [(2, None), (2, 0.25), (2, 0.5)]

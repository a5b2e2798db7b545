"""Teacher, generator, fake score, EMA and reference: who predicts a velocity, with which weights.

Two implementations behind one interface. `adapter_roles` keeps one frozen base and gives each
role LoRA adapters on it; `copy_roles` gives each role a separate fp32 network. Stage 2 stacks a
second generator adapter (`tilt`) on the frozen stage-1 one (`few_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tiltflow.models.adapters import (
    AdapterSettings,
    adapter_seed,
    add_adapter,
    call,
    frozen_below,
    load_weights,
)
from tiltflow.models.backbone import Backbone, Conditioning
from tiltflow.models.graphs import Given, Graphs, Made
from tiltflow.models.switch import FEW_STEP, AdapterSwitch, alone, stack_tilt

State = dict[str, Tensor]
Named = dict[str, dict[str, nn.Parameter]]
"""Parameters by adapter and name."""


@dataclass(frozen=True)
class Role:
    """A velocity field: `role(x, sigma, cond, guidance=None)`, fp32 of `x`'s shape.

    `guidance` is the role's own where a call gives none; None in both is what the network expects,
    without classifier-free guidance.

    `parameters` are the role's own weights by canonical name (the adapter's name left out, so
    that generator and EMA share names); empty for the teacher.

    A fake score with a network for each boundary of the few-step grid has these as `boundaries`,
    is called through `at` alone, and its parameters are theirs, as `boundary1.…` to `boundaryK.…`.
    """

    name: str
    backbone: Backbone
    network: nn.Module
    adapters: tuple[str, ...] = ()
    switch: AdapterSwitch | None = None
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    boundaries: tuple[Role, ...] = ()
    guidance: float | None = None
    graphs: Graphs | None = None

    @property
    def singles(self) -> tuple[Role, ...]:
        """The roles that have a network each: those of the boundaries, or this one."""
        return self.boundaries or (self,)

    def at(self, boundary: int | None) -> Role:
        """The role for samples at `boundary` (1 to K); one role for all of them is itself.

        `None` are samples at several boundaries, which one for each cannot take.
        """
        if not self.boundaries:
            return self
        assert boundary is not None, f"role {self.name!r} has a network for each boundary"
        return self.boundaries[boundary - 1]

    def __call__(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | None = None
    ) -> Tensor:
        assert not self.boundaries, f"role {self.name!r} has a network for each boundary"
        asked = self.guidance if guidance is None else guidance
        if self.graphs is None or not self.graphs.on or torch.is_grad_enabled():
            return self._velocity(asked, x, sigma, cond)
        return self.replayed(
            ("velocity", asked),
            lambda given: self._velocity(asked, given[0], given[1], Conditioning(*given[2:])),
            (x, sigma, dict(cond.positive), dict(cond.negative)),
        )

    def _velocity(
        self, guidance: float | None, x: Tensor, sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        kind = self.backbone.device.type
        mixed = torch.autocast(kind, self.autocast) if self.autocast else nullcontext()
        weights = self.switch.use(self.adapters) if self.switch else nullcontext()
        with mixed, weights:
            return self.backbone.velocity(self.network, x, sigma, cond, guidance)

    def replayed(self, what: Hashable, work: Callable[[Given], Made], given: Given) -> Made:
        """`work(given)`, tensors to tensors, which may leave gradients in this role's parameters:
        launched by hand, or recorded as `what` and replayed where passes are (`graphs`)."""
        if self.graphs is None or not self.graphs.on:
            return work(given)
        if self.switch is not None:
            self.switch.refresh(self.adapters)
        key = (what, id(self.network), self.adapters)
        trained = list(self.parameters.values()) if torch.is_grad_enabled() else []
        return self.graphs.run(key, work, given, trained)

    def field(
        self, cond: Conditioning, guidance: float | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(x, σ) → v with the conditioning closed over; x may hold several copies of the batch."""

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            copies = len(x) // len(cond)
            return self(x, sigma, cond if copies == 1 else cond.tile(copies), guidance)

        return velocity

    def state(self) -> State:
        return {name: p.detach() for name, p in self.parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copies weights in.

        Raises:
            ValueError: if names or shapes are not this role's.
        """
        load_weights(self.name, self.parameters, state)


def _fake_names(boundaries: int | None) -> list[str]:
    """The names of the fake score for all boundaries (None), or of those for each."""
    if boundaries is None:
        return ["fake_score"]
    return [f"fake_score_{k}" for k in range(1, boundaries + 1)]


def _fake_score(make: Callable[[str], Role], boundaries: int | None) -> Role:
    """One fake score for all boundaries, or a composite of one for each; `make` takes the name."""
    each = tuple(make(name) for name in _fake_names(boundaries))
    if boundaries is None:
        return each[0]
    joint = {f"boundary{k}.{n}": p for k, r in enumerate(each, 1) for n, p in r.parameters.items()}
    first, name = each[0], each[0].name.removesuffix("_1")
    return Role(name, first.backbone, first.network, parameters=joint, boundaries=each)


def _by_name(state: State, names: Sequence[str]) -> dict[str, State]:
    """The weights of each fake score of `names`, out of those of one or of the composite."""
    if len(names) == 1 and names[0] == "fake_score":
        return {names[0]: state}
    prefixes = {name: f"boundary{k}." for k, name in enumerate(names, 1)}
    return {
        name: {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)}
        for name, start in prefixes.items()
    }


def boundaries_of(state: Mapping[str, Tensor]) -> int:
    """How many boundaries the weights of a fake score have a network for each; 0 of one for all."""
    return len({name.partition(".")[0] for name in state if name.startswith("boundary")})


def fit_to_boundaries(state: Mapping[str, Tensor], count: int | None) -> State:
    """Weights of a fake score, for one with another number of networks.

    One for all boundaries is where each of several starts; of several, the last boundary's, which
    has seen the finished samples, is where one for all starts.
    """
    have = boundaries_of(state)
    if not have:
        numbers = range(1, (count or 0) + 1)
        each = {f"boundary{k}.{name}": value for k in numbers for name, value in state.items()}
        return each if count else dict(state)
    if count is not None:
        return dict(state)
    last = f"boundary{have}."
    return {n.removeprefix(last): value for n, value in state.items() if n.startswith(last)}


@dataclass(frozen=True)
class Roles:
    """Everyone that takes part in a run. `reference` is the stage-1 policy (stage 2 only), and
    `fake_score_below` stage 1's fake score where stage 2's lies on it as an adapter of its own."""

    teacher: Role
    generator: Role
    fake_score: Role
    ema: Role
    reference: Role | None = None
    fake_score_below: Role | None = None

    @property
    def frozen(self) -> dict[str, Role]:
        """The adapters that stage 2's lie on, by their names in a checkpoint."""
        found = {"few_step": self.reference, "few_step_fake_score": self.fake_score_below}
        return {k: r for k, r in found.items() if r is not None and r.singles[0].switch is not None}

    @torch.no_grad()
    def update_ema(self, decay: float | None, refused: Tensor | None = None) -> None:
        """ema ← decay · ema + (1 − decay) · generator, in fp32; unchanged where `refused` is 1, or
        without a `decay`."""
        if decay is None:
            return
        weight = 1 - decay if refused is None else (1 - decay) * (1 - refused)
        for name, slow in self.ema.parameters.items():
            slow.lerp_(self.generator.parameters[name], weight)

    def state(self) -> dict[str, State]:
        """What a checkpoint holds; in stage 2 with the frozen adapters underneath, so that export
        and resume need nothing of stage 1."""
        kept = {r.name: r.state() for r in (self.generator, self.fake_score, self.ema)}
        return kept | {name: role.state() for name, role in self.frozen.items()}

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for role in (self.generator, self.fake_score, self.ema):
            role.load(state[role.name])
        for name, role in self.frozen.items():
            role.load(state[name])


def adapter_roles(
    backbone: Backbone,
    settings: AdapterSettings,
    *,
    seed: int,
    few_step: tuple[AdapterSettings, State] | None = None,
    fake_score: State | None = None,
    fresh_fake_score: bool = False,
    boundaries: int | None = None,
    checkpointing: Collection[str] = (),
    autocast: torch.dtype | None = None,
    guidance: float | None = None,
    init_std: float | None = None,
    graphs: Graphs | None = None,
) -> Roles:
    """Roles as adapters over the backbone's frozen base(s).

    `few_step` is stage 1's adapter, for stage 2: it stays frozen under the generator's and the
    EMA's own. `fake_score` are stage 1's weights of the fake score, trained on, or, with
    `fresh_fake_score`, frozen under an adapter of `settings`; None is the teacher's own.
    `boundaries` gives it one for each. `checkpointing` may have `generator` and `fake_score`, all
    but the teacher are called with `guidance`, A starts with `init_std`, `graphs` record passes.
    """
    student, teacher = backbone.student_base, backbone.teacher_base
    own_seed = partial(adapter_seed, seed, "tilt" if few_step else "cold_start")
    frozen = frozen_below(student, FEW_STEP, *few_step) if few_step else None
    generator = add_adapter(student, "generator", settings, own_seed("generator"), True, init_std)
    ema = add_adapter(student, "ema", settings, own_seed("ema"), False, init_std)
    start = fit_to_boundaries(fake_score, boundaries) if fake_score is not None else None
    names, first = _fake_names(boundaries), few_step[0] if few_step else settings
    below = _frozen_fakes(teacher, names, first, start) if fresh_fake_score and start else {}
    # Trained on, it has stage 1's shape; fresh, this stage's (an exported LoRA says α = rank).
    shape = first if start and not below else settings
    fakes = {
        name: add_adapter(teacher, name, shape, own_seed(name), True, init_std) for name in names
    }
    switches = {id(base): AdapterSwitch(base) for base in (student, teacher)}
    _checkpoint((student, teacher), switches, ("generator", *fakes), checkpointing)
    role = _Maker(backbone, switches, autocast, guidance, graphs).role
    stack = stack_tilt if few_step else alone

    def fake_below(name: str) -> Role:
        return role(f"few_step_{name}", teacher, (f"few_step_{name}",), below[name])

    def fake(name: str) -> Role:
        under = (f"few_step_{name}",) if below else ()
        return role(name, teacher, (*under, name), fakes[name])

    roles = Roles(
        teacher=role("teacher", teacher, ()),
        generator=role("generator", student, stack("generator"), generator),
        fake_score=_fake_score(fake, boundaries),
        ema=role("ema", student, stack("ema"), ema),
        reference=role("reference", student, (FEW_STEP,), frozen) if few_step else None,
        fake_score_below=_fake_score(fake_below, boundaries) if below else None,
    )
    roles.ema.load(roles.generator.state())
    if start and not below:
        roles.fake_score.load(start)
    return roles


@dataclass(frozen=True)
class _Maker:
    """What the roles over shared bases have in common."""

    backbone: Backbone
    switches: Mapping[int, AdapterSwitch]
    autocast: torch.dtype | None
    guidance: float | None
    graphs: Graphs | None

    def role(
        self,
        name: str,
        base: nn.Module,
        adapters: tuple[str, ...],
        own: Mapping[str, nn.Parameter] | None = None,
    ) -> Role:
        return Role(
            name,
            self.backbone,
            base,
            adapters,
            self.switches[id(base)],
            own or {},
            self.autocast,
            guidance=None if name == "teacher" else self.guidance,
            graphs=self.graphs,
        )


def _frozen_fakes(
    teacher: nn.Module, names: Sequence[str], settings: AdapterSettings, start: State
) -> Named:
    """Stage 1's fake scores, frozen under the fresh ones: their weights by name."""
    parts = _by_name(start, names)
    return {n: frozen_below(teacher, f"few_step_{n}", settings, parts[n]) for n in names}


def _checkpoint(
    bases: Sequence[nn.Module],
    switches: Mapping[int, AdapterSwitch],
    names: Sequence[str],
    parts: Collection[str],
) -> None:
    """Has each base recompute under the adapters that are of `parts`, if any of `names` is."""
    if not any(_covered(name, parts) for name in names):
        return
    for base in {id(b): b for b in bases}.values():
        recompute_under(base, switches[id(base)], parts)


def recompute_under(base: nn.Module, switch: AdapterSwitch, parts: Collection[str]) -> None:
    """Has a base recompute under the adapters of the trained `parts`, and under no others."""
    if not {"generator", "fake_score"} & set(parts):
        return call(base, "disable_gradient_checkpointing")
    return call(base, "enable_gradient_checkpointing", _checkpointing(switch, parts))


def copy_roles(
    backbone: Backbone,
    *,
    seed: int,
    few_step: State | None = None,
    fake_score: State | None = None,
    boundaries: int | None = None,
    checkpointing: Collection[str] = (),
    autocast: torch.dtype | None = None,
    guidance: float | None = None,
) -> Roles:
    """Roles as separate fp32 networks (full fine-tuning); stage 2 starts from `few_step`."""

    def role(name: str, of: str, start: State | None, trainable: bool) -> Role:
        network = backbone.new_copy(of, seed)
        if _covered(name, checkpointing):
            call(network, "enable_gradient_checkpointing")
        own = dict(network.requires_grad_(trainable).named_parameters())
        made = Role(name, backbone, network, parameters=own, autocast=autocast, guidance=guidance)
        if start is not None:
            made.load(start)
        return made

    roles = Roles(
        teacher=Role("teacher", backbone, backbone.teacher_base, autocast=autocast),
        generator=role("generator", "student", few_step, True),
        fake_score=_fake_score(lambda name: role(name, "teacher", None, True), boundaries),
        ema=role("ema", "student", few_step, False),
        reference=None if few_step is None else role("reference", "student", few_step, False),
    )
    if fake_score is not None:
        roles.fake_score.load(fit_to_boundaries(fake_score, boundaries))
    return roles


def _covered(name: str, parts: Collection[str]) -> bool:
    """Whether a role or adapter is of `parts`, where `fake_score` is all the fake scores."""
    return ("fake_score" if name.startswith("fake_score") else name) in parts


def _checkpointing(switch: AdapterSwitch, parts: Collection[str]) -> Callable[..., Tensor]:
    """Gradient checkpointing whose recomputation sees the adapters of the forward pass; none under
    adapters that are not of `parts`."""

    def run(module: nn.Module, *args: Tensor) -> Tensor:
        names = switch.active or ()
        if not any(_covered(name, parts) for name in names):
            return module(*args)

        def forward(*inputs: Tensor) -> Tensor:
            with switch.use(names):
                return module(*inputs)

        # no pass draws random numbers, whose state would be kept and put back
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return run

"""Teacher, generator, fake score, EMA and reference: who predicts a velocity, with which weights.

Two implementations behind one interface. `adapter_roles` keeps one frozen base and gives each
role LoRA adapters on it; `copy_roles` gives each role a separate fp32 network. Stage 2 stacks a
second generator adapter (`tilt`) on the frozen stage-1 one (`few_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tiltflow.adapters import AdapterSettings, add_adapter, call
from tiltflow.backbones.base import Backbone, Conditioning
from tiltflow.low_rank import FusedLinear

State = dict[str, Tensor]


class AdapterSwitch:
    """Flips the active adapters of a network, and nothing else.

    PEFT's own `set_adapter` and `enable_adapters` also change `requires_grad`, which loses the
    gradient of a graph built under another adapter and unfreezes frozen ones.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
        self.active: tuple[str, ...] | None = None
        self.set(())

    def set(self, names: tuple[str, ...]) -> None:
        if names == self.active:
            return
        for layer in self.layers:
            layer._disable_adapters = not names
            layer._active_adapter = list(names)
            if isinstance(layer, FusedLinear):
                layer.parts = layer.active_parts()
        self.active = names

    @contextmanager
    def use(self, names: tuple[str, ...]) -> Iterator[None]:
        before = self.active or ()
        self.set(names)
        try:
            yield
        finally:
            self.set(before)


@dataclass(frozen=True)
class Role:
    """A velocity field: `role(x, sigma, cond, guidance=1.0)`, fp32 of `x`'s shape.

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
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float = 1.0
    ) -> Tensor:
        kind = self.backbone.device.type
        assert not self.boundaries, f"role {self.name!r} has a network for each boundary"
        mixed = torch.autocast(kind, self.autocast) if self.autocast else nullcontext()
        weights = self.switch.use(self.adapters) if self.switch else nullcontext()
        with mixed, weights:
            return self.backbone.velocity(self.network, x, sigma, cond, guidance)

    def field(
        self, cond: Conditioning, guidance: float = 1.0
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(x, σ) → v with the conditioning closed over; x may hold several copies of the batch."""

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            copies = len(x) // len(cond)
            return self(x, sigma, cond if copies == 1 else cond.tile(copies), guidance)

        return velocity

    def state(self) -> State:
        return {name: p.detach() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copies weights in.

        Raises:
            ValueError: if names or shapes are not this role's.
        """
        missing = sorted(set(self.parameters) ^ set(state))
        if missing:
            raise ValueError(
                f"weights of role {self.name!r} do not match, e.g. {missing[0]!r}: they are of "
                "another model or other adapters"
            )
        for name, parameter in self.parameters.items():
            if parameter.shape != state[name].shape:
                raise ValueError(
                    f"{name!r} of role {self.name!r} is {tuple(parameter.shape)} here but "
                    f"{tuple(state[name].shape)} in the weights to load"
                )
            parameter.copy_(state[name])


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
    first = each[0]
    return Role("fake_score", first.backbone, first.network, parameters=joint, boundaries=each)


def fit_to_boundaries(state: Mapping[str, Tensor], count: int | None) -> State:
    """Weights of a fake score, for one with another number of networks.

    One for all boundaries is where each of several starts; of several, the last boundary's, which
    has seen the finished samples, is where one for all starts.
    """
    have = {name.partition(".")[0] for name in state if name.startswith("boundary")}
    if not have:
        numbers = range(1, (count or 0) + 1)
        each = {f"boundary{k}.{name}": value for k in numbers for name, value in state.items()}
        return each if count else dict(state)
    if count is not None:
        return dict(state)
    last = f"boundary{len(have)}."
    return {n.removeprefix(last): value for n, value in state.items() if n.startswith(last)}


@dataclass(frozen=True)
class Roles:
    """Everyone that takes part in a run. `reference` is the stage-1 policy (stage 2 only)."""

    teacher: Role
    generator: Role
    fake_score: Role
    ema: Role
    reference: Role | None = None

    @torch.no_grad()
    def update_ema(self, decay: float, refused: Tensor | None = None) -> None:
        """ema ← decay · ema + (1 − decay) · generator, in fp32; unchanged where `refused` is 1."""
        weight = 1 - decay if refused is None else (1 - decay) * (1 - refused)
        for name, slow in self.ema.parameters.items():
            slow.lerp_(self.generator.parameters[name], weight)

    def state(self) -> dict[str, State]:
        """What a checkpoint holds; in stage 2 with the frozen adapter underneath, for export."""
        kept = {r.name: r.state() for r in (self.generator, self.fake_score, self.ema)}
        if self.reference is not None and self.reference.switch is not None:
            kept["few_step"] = self.reference.state()
        return kept

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for role in (self.generator, self.fake_score, self.ema):
            role.load(state[role.name])


def adapter_roles(
    backbone: Backbone,
    settings: AdapterSettings,
    *,
    seed: int,
    few_step: tuple[AdapterSettings, State] | None = None,
    fake_score: State | None = None,
    boundaries: int | None = None,
    checkpointing: Collection[str] = (),
    autocast: torch.dtype | None = None,
) -> Roles:
    """Roles as adapters over the backbone's frozen base(s).

    `few_step` is stage 1's adapter, for stage 2: it stays frozen under the generator's and the
    EMA's own. `fake_score` are the weights that the fake score starts from (default: the teacher's
    own, that is, an adapter that does nothing); `boundaries` gives it as many adapters, one for
    each boundary. `checkpointing` may have `generator` and `fake_score`.
    """
    student, teacher = backbone.student_base, backbone.teacher_base
    stack: tuple[str, ...] = ()
    frozen: dict[str, nn.Parameter] = {}
    if few_step is not None:
        stack = ("few_step",)
        frozen = add_adapter(student, "few_step", few_step[0], seed, trainable=False)
        Role("few_step", backbone, student, parameters=frozen).load(few_step[1])
    generator = add_adapter(student, "generator", settings, seed, trainable=True)
    ema = add_adapter(student, "ema", settings, seed, trainable=False)
    # The fake score follows the few-step generator, so it has the settings of its adapter.
    fake_settings = few_step[0] if few_step is not None else settings
    fakes = {
        name: add_adapter(teacher, name, fake_settings, seed + k, trainable=True)
        for k, name in enumerate(_fake_names(boundaries), 1)
    }
    switches = {id(base): AdapterSwitch(base) for base in (student, teacher)}
    if any(_covered(name, checkpointing) for name in ("generator", *fakes)):
        for base in {id(b): b for b in (student, teacher)}.values():
            function = _checkpointing(switches[id(base)], checkpointing)
            call(base, "enable_gradient_checkpointing", function)

    def role(
        name: str, base: nn.Module, adapters: tuple[str, ...], own: dict | None = None
    ) -> Role:
        return Role(name, backbone, base, adapters, switches[id(base)], own or {}, autocast)

    roles = Roles(
        teacher=role("teacher", teacher, ()),
        generator=role("generator", student, (*stack, "generator"), generator),
        fake_score=_fake_score(lambda name: role(name, teacher, (name,), fakes[name]), boundaries),
        ema=role("ema", student, (*stack, "ema"), ema),
        reference=role("reference", student, stack, frozen) if stack else None,
    )
    roles.ema.load(roles.generator.state())
    if fake_score is not None:
        roles.fake_score.load(fit_to_boundaries(fake_score, boundaries))
    return roles


def copy_roles(
    backbone: Backbone,
    *,
    seed: int,
    few_step: State | None = None,
    fake_score: State | None = None,
    boundaries: int | None = None,
    checkpointing: Collection[str] = (),
    autocast: torch.dtype | None = None,
) -> Roles:
    """Roles as separate fp32 networks (full fine-tuning); stage 2 starts from `few_step`."""

    def role(name: str, of: str, start: State | None, trainable: bool) -> Role:
        network = backbone.new_copy(of, seed)
        if _covered(name, checkpointing):
            call(network, "enable_gradient_checkpointing")
        own = dict(network.requires_grad_(trainable).named_parameters())
        made = Role(name, backbone, network, parameters=own, autocast=autocast)
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

        return checkpoint(forward, *args, use_reentrant=False)

    return run

"""What a run will hold in a device's memory, before anything of it is loaded.

What lies there throughout is counted from shapes: weights, adapters, gradients, optimizer states,
the global batch's latents and conditioning. What comes and goes is measured and not guessed: each
phase of an iteration runs once, one micro-batch of it, on the meta device, where every operation
makes its result in shape only, and `Tally` adds up the storages that are alive at a time.

Not counted: the allocator's fragmentation and the libraries' own memory (`OVERHEAD` stands for
both), and reward models (`commands.planning` adds them to a plan).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiltflow.method.distribution_matching import matching_gradient, matching_loss
from tiltflow.method.fake_score import FakeScoreDraws, fake_score_objective
from tiltflow.method.reward_backprop import reward_gradient
from tiltflow.method.rollout import Rollout, advance, attach_from, rollout
from tiltflow.models.backbone import Conditioning
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.kernel_shapes import fused_kernels
from tiltflow.models.pipelines.meta import META
from tiltflow.models.pipelines.storage import FP8
from tiltflow.models.roles import AdapterSettings, Roles, adapter_roles, copy_roles

GIB = 2**30
OVERHEAD = 1.5 * GIB
"""CUDA's context, cuBLAS's and cuDNN's workspaces, and the allocator's rounding: a round figure."""


class Tally(TorchDispatchMode):
    """Bytes of the storages that operations make, while they live: `live` now, `peak` so far.

    (torch.distributed._tools.MemTracker counts the same to the byte, and is private. It would run a
    whole iteration, too, but not one on the meta device, where no loss or reward has a value; and
    the peaks wanted are those of each phase.)
    """

    def __init__(self, *held: nn.Module | Tensor) -> None:
        """Storages of `held` are there already and not counted."""
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}
        for thing in held:
            for tensor in [thing] if isinstance(thing, Tensor) else _tensors(thing):
                self._note(tensor.untyped_storage(), counted=False)

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                # a weight that returns to its 8 bits takes the place of what it was before
                self._note(leaf.untyped_storage(), counted=leaf.dtype != FP8)
        return result

    def _note(self, storage: torch.UntypedStorage, counted: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if counted else 0
        weakref.finalize(storage, self._forget, key)
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


@dataclass(frozen=True)
class Job:
    """What a run does, as far as its memory goes; the names are the recipe's.

    `tilt` None is stage 1; `boundaries` None is one fake score for all of them. `fused` says
    whether attention is a fused kernel (GPUs) or the plain one that training takes on a CPU, and
    `negatives` whether each prompt has a negative one of its own.
    """

    batch: int
    micro: int
    steps: int
    guidance: float
    consistency: bool
    adapters: AdapterSettings | None
    checkpointing: frozenset[str] = frozenset()
    tilt: TiltJob | None = None
    fused: bool = True
    boundaries: int | None = None
    keep_graph: bool = False
    negatives: bool = False


@dataclass(frozen=True)
class TiltJob:
    """Stage 2's own: group size, rows decoded at once, steps that rewards go back through, and
    steps whose graphs are kept where graphs are, and the passes that a span of the recipe's further
    terms holds at once (`Term.passes`)."""

    group: int
    decode_chunk: int
    reward_steps: int
    stage_one: AdapterSettings | None
    fresh_fake_score: bool = False
    graphs: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Plan:
    """Bytes: `held` throughout by what they are, and in each phase of an iteration on top.

    `encoding` is before training: the text encoders, which are loaded by themselves, with what they
    make of a batch of prompts.
    """

    held: Mapping[str, int]
    phases: Mapping[str, int]
    encoding: int

    @property
    def worst(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> int:
        """The most that an iteration needs, without `OVERHEAD`."""
        return sum(self.held.values()) + self.phases[self.worst]

    def fits(self, memory: float) -> bool:
        """Whether a device with `memory` bytes will do."""
        return max(self.peak, self.encoding) + OVERHEAD <= memory


def plan(make: Callable[[], PipelineBackbone], job: Job, encoders: int = 0) -> Plan:
    """The memory of a run on the pipelines that `make` makes (on the meta device; called twice).

    `encoders` are the bytes while prompts are encoded, which are gone before training.
    """
    roles = _roles(make, job)
    backbone = roles.generator.backbone
    assert isinstance(backbone, PipelineBackbone)
    backbone.fuse()
    if "decoder" in job.checkpointing:
        backbone.checkpoint_decoder()
    copied = _copied(roles)
    trained = [roles.generator, roles.fake_score]
    updated = [roles.generator, roles.fake_score.at(1)]  # one fake score at a time has gradients
    for role in updated:  # of a micro-batch before, which the next one adds to
        for parameter in role.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
    every = [*trained, roles.ema, *([roles.reference] if roles.reference else [])]
    sizes = {role.name: _bytes(role.parameters.values()) for role in every}
    bases = {id(b): b for b in (backbone.student_base, backbone.teacher_base)}
    own = {id(p) for role in every for p in role.parameters.values()}
    held = {
        "base weights": sum(
            _bytes(t for t in _tensors(b) if id(t) not in own) for b in bases.values()
        ),
        "autoencoder": _bytes(_tensors(backbone.vae)),
        "adapters and EMA": sum(sizes.values()) + copied,
        "optimizer states": 2 * sum(sizes[role.name] for role in trained),
        "gradients": max(_bytes(role.parameters.values()) for role in updated),
        "conditioning": _conditioning_bytes(backbone, job),
    }
    latents = job.batch * _latent_bytes(backbone)
    phases = {}
    for name, copies, run in _phases(roles, backbone, job):
        phases[name] = copies * latents + _traced(run, job.fused, roles, backbone)
    if job.tilt is not None and job.keep_graph:
        one = _traced(
            lambda: _advance(roles, backbone, job), job.fused, roles, backbone, whole=False
        )
        held["graphs of the generator's steps"] = job.tilt.graphs * -(-job.batch // job.micro) * one
        phases["generator"] -= one  # the phase makes one of them itself
    if job.fused:  # several ranks add up one flat copy of the gradients
        phases["optimizer step"] = (job.steps + 1) * latents + held["gradients"]
    return Plan(held, phases, encoders)


def _roles(make: Callable[[], PipelineBackbone], job: Job) -> Roles:
    """The run's roles; adapters are made on the meta device too."""
    with META:
        if job.adapters is None:
            backbone = make()
            few_step: dict[str, Tensor] | None = None
            if job.tilt is not None:
                few_step = dict(backbone.student_base.named_parameters())
            return copy_roles(
                backbone,
                seed=0,
                few_step=few_step,
                boundaries=job.boundaries,
                checkpointing=job.checkpointing,
            )
        below, fake = None, None
        if job.tilt is not None:
            first = job.tilt.stage_one or job.adapters
            one = adapter_roles(make(), first, seed=0, boundaries=job.boundaries)
            below, fake = (first, one.generator.state()), one.fake_score.state()
        return adapter_roles(
            make(),
            job.adapters,
            seed=0,
            few_step=below,
            fake_score=fake,
            fresh_fake_score=job.tilt is not None and job.tilt.fresh_fake_score,
            boundaries=job.boundaries,
            checkpointing=job.checkpointing,
        )


def _copied(roles: Roles) -> int:
    """Bytes of the adapters' copies in the type that the base computes in, which are made here."""
    copies: dict[int, Tensor] = {}
    for role in (
        roles.teacher,
        roles.generator,
        roles.ema,
        roles.reference,
        *roles.fake_score.singles,
    ):
        if role is not None and role.switch is not None:
            with role.switch.use(role.adapters):
                copies |= {id(t): t for made in role.switch.copies.values() for t in made.tensors}
    return _bytes(copies.values())


Phase = tuple[str, int, Callable[[], object]]


def _phases(roles: Roles, backbone: PipelineBackbone, job: Job) -> list[Phase]:
    """Name, how many latents of the global batch are alive, and one micro-batch's work.

    The numbers of latents are read off `train/`: K + 1 states of the trajectory, and what a phase
    adds. A rollout has its first noise, its steps' noise, and its states once by micro-batches
    and once joined; a fake-score update three draws (and in stage 2 the boundaries stacked).
    """
    states = job.steps + 1
    stacked = states if job.tilt else 0
    phases: list[Phase] = [
        ("rollout", 1 + 2 * job.steps + states, lambda: _rollout(roles, backbone, job)),
        ("fake score", states + stacked + 3, lambda: _fake_score(roles, backbone, job)),
        ("matching", states + 4, lambda: _matching(roles, backbone, job)),
        ("generator", states + 1, lambda: _generator(roles, backbone, job)),
    ]
    if job.tilt is not None:
        tilt = job.tilt
        phases.append(("scoring", states + 1, lambda: _score(backbone, tilt)))
    return phases


def _traced(
    run: Callable[[], object],
    fused: bool,
    roles: Roles,
    backbone: PipelineBackbone,
    whole: bool = True,
) -> int:
    """The peak of what `run` makes; or what is left of it in its result."""
    attention: AbstractContextManager[object] = fused_kernels() if fused else nullcontext()
    networks = {id(r.network): r.network for r in (roles.generator, roles.fake_score.at(1))}
    networks |= {id(r.network): r.network for r in (roles.teacher, roles.ema)}
    gradients = [p.grad for n in networks.values() for p in n.parameters() if p.grad is not None]
    with Tally(*networks.values(), backbone.vae, *gradients) as tally, attention:
        made = run()
        left = tally.live
    del made
    return tally.peak if whole else left


def _rollout(roles: Roles, backbone: PipelineBackbone, job: Job) -> object:
    x, cond = _latents(backbone, job.micro), _conditioning(backbone, job.micro)
    return rollout(roles.generator, x, _grid(job), cond, 0.5, lambda k: x, stop=1)


def _fake_score(roles: Roles, backbone: PipelineBackbone, job: Job) -> object:
    x, level = _latents(backbone, job.micro), torch.empty(job.micro, device=META)
    kept = _kept(roles, backbone, job)
    losses, _ = fake_score_objective(
        roles.fake_score.at(1).field(_conditioning(backbone, job.micro)),
        x,
        level,
        FakeScoreDraws(level, x, level, (x, x)),
        0.01 if job.consistency else 0.0,
        0.5,
    )
    losses.sum().backward()
    return kept


def _kept(roles: Roles, backbone: PipelineBackbone, job: Job) -> list[Tensor]:
    """The generator's step of every micro-batch with its graph, where stage 1 keeps it."""
    parts = -(-job.batch // job.micro) if job.keep_graph and job.tilt is None else 0
    return [_advance(roles, backbone, job) for _ in range(parts)]


def _advance(roles: Roles, backbone: PipelineBackbone, job: Job) -> Tensor:
    x, cond = _latents(backbone, job.micro), _conditioning(backbone, job.micro)
    return advance(roles.generator, Rollout(_grid(job), {0: x}, cond, 0.5), 0, x)


def _matching(roles: Roles, backbone: PipelineBackbone, job: Job) -> object:
    x, level = _latents(backbone, job.micro), torch.empty(job.micro, device=META)
    cond = _conditioning(backbone, job.micro)
    teacher = roles.teacher.field(cond, job.guidance)
    fake_score = roles.fake_score.at(1).field(cond)
    kept = _kept(roles, backbone, job)
    return kept, matching_gradient(x, level, level, x, x, teacher, fake_score, 0.5)


def _generator(roles: Roles, backbone: PipelineBackbone, job: Job) -> object:
    x, cond = _latents(backbone, job.micro), _conditioning(backbone, job.micro)
    steps = 0
    if job.tilt is not None:  # kept graphs are gone back through one at a time
        pulled = min(job.tilt.reward_steps, 1) if job.keep_graph else job.tilt.reward_steps
        steps = max(pulled, job.tilt.passes)
    trajectory = Rollout(_grid(job), dict.fromkeys(range(max(steps, 1) + 1), x), cond, 0.5)
    x_next = attach_from(roles.generator, trajectory, 0)
    losses = matching_loss(x_next, x)
    if job.tilt is not None and steps:
        losses = losses + (x_next * x).flatten(1).sum(1)
    return losses.sum().backward()


def _score(backbone: PipelineBackbone, tilt: TiltJob) -> object:
    x = _latents(backbone, tilt.decode_chunk)
    if tilt.reward_steps == 0:
        with torch.no_grad():
            return backbone.decode(x)
    return reward_gradient(
        x, backbone.decode, lambda images, rows: images.flatten(1).mean(1), 3.0, len(x)
    )


def _grid(job: Job) -> Tensor:
    return torch.linspace(1, 0, job.steps + 1)


def _latents(backbone: PipelineBackbone, rows: int) -> Tensor:
    return torch.empty(rows, *backbone.latent_shape, device=META)


def _latent_bytes(backbone: PipelineBackbone) -> int:
    return _latents(backbone, 1).nbytes


def _conditioning(backbone: PipelineBackbone, rows: int) -> Conditioning:
    dtype = backbone.input_dtype(backbone.teacher_base)
    side = {
        key: torch.empty(rows, *shape, dtype=dtype, device=META)
        for key, shape in backbone.conditioning_shapes().items()
    }
    return Conditioning(side, side)


def _conditioning_bytes(backbone: PipelineBackbone, job: Job) -> int:
    """The global batch's conditioning, a group's prompt once; the negative is one row, unless
    prompts have negative ones of their own."""
    prompts = job.batch // (job.tilt.group if job.tilt else 1)
    return (prompts + (prompts if job.negatives else 1)) * sum(
        t.nbytes for t in _conditioning(backbone, 1).positive.values()
    )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)

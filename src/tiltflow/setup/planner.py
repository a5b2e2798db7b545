"""What a run will hold in a device's memory, before anything of it is loaded.

What lies there throughout is counted from shapes: weights, adapters, gradients, optimizer states,
the global batch's latents and conditioning. What comes and goes is measured and not guessed: each
phase of an iteration runs once, one micro-batch of it, on the meta device, where every operation
makes its result in shape only, and `Tally` adds up the storages that are alive at a time.

Not counted: the allocator's fragmentation and the libraries' own memory (`OVERHEAD` stands for
both), and reward models (`tasks.plans` adds them to a plan).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltflow.method.distribution_matching import matching_gradient, matching_loss
from tiltflow.method.fake_score import FakeScoreDraws, fake_score_objective
from tiltflow.method.reward_backprop import reward_gradient
from tiltflow.method.rollout import Rollout, advance, attach_from, rollout
from tiltflow.models.backbone import Conditioning
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.kernel_shapes import fused_kernels
from tiltflow.models.pipelines.meta import META
from tiltflow.models.roles import (
    AdapterSettings,
    Role,
    Roles,
    adapter_roles,
    copy_roles,
    recompute_under,
)
from tiltflow.setup.tally import Tally, bytes_of, tensors_of

GIB = 2**30
OVERHEAD = 1.5 * GIB
"""CUDA's context, cuBLAS's and cuDNN's workspaces, and the allocator's rounding: a round figure."""


@dataclass(frozen=True)
class Job:
    """What a run does, as far as its memory goes; the names are the recipe's.

    `tilt` None is stage 1; `boundaries` None is one fake score for all of them. `consistency` is
    that regulariser's form, None without it. `fused` says whether attention is a fused kernel
    (GPUs) or the plain one that training takes on a CPU, and `negatives` whether each prompt has a
    negative one of its own.
    """

    batch: int
    micro: int
    steps: int
    guidance: float
    consistency: str | None
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


class Planner:
    """Plans of jobs on the pipelines that `make` makes, on the meta device. What several jobs have
    in common is made once: the roles, and a phase that is the same in both.

    `encoders` are the bytes while prompts are encoded, which are gone before training.
    """

    def __init__(self, make: Callable[[], PipelineBackbone], encoders: int = 0) -> None:
        self.make, self.encoders = make, encoders
        self._roles: dict[str, Roles] = {}
        self._peaks: dict[tuple[str, str], int] = {}

    def plan(self, job: Job) -> Plan:
        """The memory of a run that does `job`."""
        roles = self._roles_of(job)
        backbone = roles.generator.backbone
        assert isinstance(backbone, PipelineBackbone)
        for role in _updated(roles):
            if role.switch is not None:
                recompute_under(role.network, role.switch, job.checkpointing)
        held = _held(roles, backbone, job)
        latents = job.batch * _latent_bytes(backbone)
        phases = {}
        for name, copies, run in _phases(roles, backbone, job):
            phases[name] = copies * latents + self._peak(name, run, roles, job)
        if job.tilt is not None and job.keep_graph:
            one = self._peak("step", lambda: _advance(roles, backbone, job), roles, job)
            count = job.tilt.graphs * -(-job.batch // job.micro)
            held["graphs of the generator's steps"] = count * one
            phases["generator"] -= one  # the phase makes one of them itself
        if job.fused:  # several ranks add up one flat copy of the gradients
            phases["optimizer step"] = (job.steps + 1) * latents + held["gradients"]
        return Plan(held, phases, self.encoders)

    def _roles_of(self, job: Job) -> Roles:
        """The roles. Adapters recompute what a job before did; copies, and a decoder, as made."""
        of = {"decoder"} if job.adapters is not None else job.checkpointing
        parts = job.checkpointing & of
        stage = None if job.tilt is None else (job.tilt.stage_one, job.tilt.fresh_fake_score)
        key = repr((job.adapters, stage, job.boundaries, sorted(parts)))
        if key not in self._roles:
            roles = self._roles[key] = _roles(self.make, replace(job, checkpointing=parts))
            backbone = roles.generator.backbone
            assert isinstance(backbone, PipelineBackbone)
            backbone.fuse()
            if "decoder" in parts:
                backbone.checkpoint_decoder()
            for role in _updated(roles):  # of a micro-batch before, which the next one adds to
                for parameter in role.parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
        return self._roles[key]

    def _peak(self, name: str, run: Callable[[], object], roles: Roles, job: Job) -> int:
        """The peak of a phase; of a "step", what is left of it. Traced where it is another one than
        in every job so far."""
        networks = job.checkpointing - {"decoder"}
        matters = {"scoring": job.checkpointing & {"decoder"}}.get(name, networks)
        key = (name, repr(replace(job, checkpointing=frozenset(matters))))
        if key not in self._peaks:
            backbone = roles.generator.backbone
            assert isinstance(backbone, PipelineBackbone)
            self._peaks[key] = _traced(run, job.fused, roles, backbone, whole=name != "step")
        return self._peaks[key]


def _updated(roles: Roles) -> list[Role]:
    """Those with gradients at a time: one fake score has them."""
    return [roles.generator, roles.fake_score.at(1)]


def _held(roles: Roles, backbone: PipelineBackbone, job: Job) -> dict[str, int]:
    """Bytes that are there throughout, by what they are."""
    trained = [roles.generator, roles.fake_score]
    every = [*trained, roles.ema, *([roles.reference] if roles.reference else [])]
    sizes = {role.name: bytes_of(role.parameters.values()) for role in every}
    bases = {id(b): b for b in (backbone.student_base, backbone.teacher_base)}
    own = {id(p) for role in every for p in role.parameters.values()}
    return {
        "base weights": sum(
            bytes_of(t for t in tensors_of(b) if id(t) not in own) for b in bases.values()
        ),
        "autoencoder": bytes_of(tensors_of(backbone.vae)),
        "adapters and EMA": sum(sizes.values()) + _copied(roles),
        "optimizer states": 2 * sum(sizes[role.name] for role in trained),
        "gradients": max(bytes_of(role.parameters.values()) for role in _updated(roles)),
        "conditioning": _conditioning_bytes(backbone, job),
    }


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
    return bytes_of(copies.values())


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
        job.consistency or "two_sample",
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
    prompts = -(-job.batch // (job.tilt.group if job.tilt else 1))
    return (prompts + (prompts if job.negatives else 1)) * sum(
        t.nbytes for t in _conditioning(backbone, 1).positive.values()
    )

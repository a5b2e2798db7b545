"""What a run costs in network evaluations, counted without its model.

How many rows go through a network in an iteration depends on the settings and on counted draws
(where a rollout stops, which steps are trained), and on no value. So the stage of a config is run
over the mixture's small network in the model's place, and every pass is counted there: exact for
each iteration, the same however often the run itself was killed, and a matter of seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn

from tiltflow.config.load import RunConfig
from tiltflow.data.embeddings import encode_prompts
from tiltflow.data.prompts import Prompt
from tiltflow.models.backbone import Conditioning
from tiltflow.models.families import load_backbone
from tiltflow.models.families.mixture import MixtureBackbone
from tiltflow.models.pipelines.meta import meta_backbone
from tiltflow.models.roles import copy_roles
from tiltflow.rewards.base import Metadata, load_reward
from tiltflow.rewards.combine import RewardMixture, Weighted
from tiltflow.rewards.remote.asking import ranks
from tiltflow.setup.assemble import make_stages
from tiltflow.setup.build import fake_scores
from tiltflow.training.updates import Share


@dataclass(frozen=True)
class Cost:
    """Rows × passes: through a network `forward` and `backward`, and through a reward (`scored`),
    of which with a gradient back to the sample (`pulled`)."""

    forward: int = 0
    backward: int = 0
    scored: int = 0
    pulled: int = 0

    @property
    def evaluations(self) -> int:
        """Network evaluations, a backward pass counting as one."""
        return self.forward + self.backward

    def __add__(self, other: Cost) -> Cost:
        mine, theirs = vars(self), vars(other)
        return Cost(**{name: mine[name] + theirs[name] for name in mine})


@dataclass
class Counter:
    """Counts passes as they happen; a backward one when a gradient reaches what a pass gave."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, rows: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + rows

    def saw(self, made: Tensor, rows: int, there: str, back: str) -> Tensor:
        """`made` came out of a pass of `rows` rows."""
        self.add(there, rows)
        if made.requires_grad:
            made.register_hook(lambda gradient: self.add(back, rows))
        return made

    def take(self) -> Cost:
        """What was counted since the last time."""
        found, self.counts = Cost(**self.counts), {}
        return found


def costs(cfg: RunConfig) -> Iterator[Cost]:
    """The cost of iteration 0, 1, … of a run, without end.

    Raises:
        ValueError: if the model's directory or a reward cannot be read, or pictures are of several
            sizes, of which a pass would not cost the same.
    """
    if cfg.data.buckets is not None:
        raise ValueError("data.buckets: evaluations at several sizes do not cost the same")
    counter = Counter()
    backbone = _Stand(counter, *_guidance(cfg))
    below = dict(backbone.student_base.state_dict()) if cfg.stage == "tilt" else None
    roles = copy_roles(
        backbone,
        seed=0,
        few_step=below,
        boundaries=fake_scores(cfg),
        guidance=cfg.model.student_guidance,
    )
    rewards = None
    if cfg.stage == "tilt":
        rewards = RewardMixture(_stands(cfg, counter))
    still = {"generator_lr": 1e-12, "fake_score_lr": 1e-12, "schedule": "constant"}
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update=still)})
    share = Share(cfg.train.batch_size, cfg.train.batch_size)
    encoded = encode_prompts(backbone, [Prompt("")])
    _, stage = make_stages(cfg, backbone, encoded, roles, share, rewards)
    stage.iteration(0)  # it looks at a reward's first images once more, which is no step's cost
    counter.take()
    for step in count():
        stage.iteration(step)
        stage.guard.failures()  # it keeps every iteration's until it is asked
        yield counter.take()


def within(cfg: RunConfig, budget: int) -> tuple[int, Cost]:
    """How many iterations a budget of network evaluations pays for, and what they cost in all.

    Raises:
        ValueError: if it does not pay for one; and as `costs`.
    """
    steps, total = 0, Cost()
    for each in costs(cfg):
        if (total + each).evaluations > budget:
            break
        steps, total = steps + 1, total + each
    if not steps:
        raise ValueError(
            f"a budget of {budget:,} network evaluations does not pay for one iteration, "
            f"which takes {each.evaluations:,}"
        )
    return steps, total


class _Stand(MixtureBackbone):
    """The mixture in the model's place, whose passes are counted as the model's would be."""

    def __init__(self, counter: Counter, guidance: float, passes: Callable[[float], int]) -> None:
        super().__init__(fit_steps=0)
        self.counter, self.guidance, self._passes = counter, guidance, passes

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        made = super().velocity(network, x, sigma, cond)
        rows = len(x) * (1 if guidance is None else self._passes(guidance))
        return self.counter.saw(made, rows, "forward", "backward")


class _Score:
    """A reward's stand-in: the first coordinate under the reward's name."""

    domain = "points"

    def __init__(self, name: str, differentiable: bool, counter: Counter) -> None:
        self.name, self.differentiable, self._counter = name, differentiable, counter

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            return self._counter.saw(images[:, 0].clone(), len(images), "scored", "pulled")


def _stands(cfg: RunConfig, counter: Counter) -> list[Weighted]:
    found = []
    for name, chosen in cfg.rewards.items():
        if ranks(name, chosen.options):  # it sees as many images as a reward does
            differentiable = False
        else:
            reward = load_reward(name, path=chosen.path, options=chosen.options)
            name, differentiable = reward.name, reward.differentiable
        stand = _Score(name, differentiable, counter)
        found.append(Weighted(stand, chosen.weight, chosen.backprop))
    return found


def _guidance(cfg: RunConfig) -> tuple[float, Callable[[float], int]]:
    """The teacher's guidance, and how many passes of the model a guidance takes."""
    model = cfg.model
    if model.has_files:
        pipelines = model.pipelines
        real = meta_backbone(
            pipelines.model, generator_path=pipelines.generator, resolution=model.resolution
        )
        return (real.guidance if model.guidance is None else model.guidance), real.passes
    small = load_backbone(model.path, family=model.family, device="cpu")
    return (small.guidance if model.guidance is None else model.guidance), small.passes

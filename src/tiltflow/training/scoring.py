"""A rollout's rewards, and their gradient with respect to its samples, in one pass (METHOD §5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tiltflow.core.background import Background
from tiltflow.data.prompts import Prompt
from tiltflow.method.reward_backprop import reward_gradient
from tiltflow.models.medium import IMAGES, Medium
from tiltflow.rewards.base import NonFiniteScore, checked
from tiltflow.rewards.combine import RewardMixture
from tiltflow.rewards.purity import Examined
from tiltflow.rewards.ranking import Groups, ranked
from tiltflow.training.optim import NonFiniteError
from tiltflow.training.updates import Share, micro_batches


@dataclass(frozen=True)
class Scored:
    """`scores`: every reward of the global batch, name → (B,), and rankers' standings.

    `losses` (b,) are relu(target − R) of this rank's samples and `gradient` (b, ...) their
    gradient with respect to x̂₀; None where no reward is back-propagated.
    """

    scores: dict[str, Tensor]
    losses: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Scorer:
    """Decodes samples once, for their scores and for the gradient of the differentiable rewards.

    `chunk` samples are in a decoder and in a reward model at a time.
    """

    rewards: RewardMixture
    decode: Callable[[Tensor], Tensor]
    share: Share
    target: float
    chunk: int
    rounded: bool = False
    """Whether scores are of images in 8 bits, as files hold them; gradients never are."""
    medium: Medium = IMAGES
    examined: Examined = field(default_factory=Examined)

    def shown(self, images: Tensor) -> Tensor:
        """The images that are scored."""
        return self.medium.rounded(images) if self.rounded else images

    def begin(
        self,
        x0: Tensor,
        prompts: Sequence[Prompt],
        backprop: bool,
        groups: Groups | None = None,
    ) -> Scoring:
        """Scores this rank's samples x0 (b, ...) by the rewards that compute here, and has those
        that compute elsewhere begin. Rankers rank them within `groups`."""
        scoring = Scoring(self, prompts, groups)
        try:
            scoring.begin(x0, backprop)
        except BaseException:
            scoring.close()
            raise
        return scoring


class Scoring:
    """The scores of one rollout, on their way; to be closed (a `with` block does)."""

    def __init__(
        self, scorer: Scorer, prompts: Sequence[Prompt], groups: Groups | None = None
    ) -> None:
        self._scorer, self._prompts, self._groups = scorer, prompts, groups
        self._names = tuple(scorer.rewards.advantage_weights)
        rankers = [item.ranker for item in scorer.rewards.rankers]
        # One that computes here does so at once: it may have the device of this thread's work.
        self._rankers = [
            (one, Background(f"reward {one.name}") if one.elsewhere else None) for one in rankers
        ]
        self._decoded: list[tuple[slice, Tensor]] = []
        self._here = scorer.rewards.here
        away = [item.reward for item in scorer.rewards.elsewhere]
        self._threads = [(reward, Background(f"reward {reward.name}")) for reward in away]
        self._later: list[tuple[str, slice, Future]] = []
        self._losses: Tensor | None = None
        self._gradient: Tensor | None = None
        self._problem: Exception | None = None

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Calls that have not begun are not made any more."""
        for _, thread in (*self._threads, *self._rankers):
            if thread is not None:
                thread.close()

    def begin(self, x0: Tensor, backprop: bool) -> None:
        scorer = self._scorer
        self._mine = x0.new_full((len(x0), len(self._names)), torch.nan)
        try:
            if backprop:
                self._losses, self._gradient = reward_gradient(
                    x0, scorer.decode, self._total, scorer.target, scorer.chunk
                )
            else:
                for rows in micro_batches(len(x0), scorer.chunk):
                    with torch.no_grad():
                        self._plain(scorer.decode(x0[rows]), rows)
            self._rank()
        except NonFiniteScore as error:
            self._problem = error

    def _rank(self) -> None:
        """Has the rankers begin, who need all images of a group."""
        if not self._rankers:
            return
        assert self._groups is not None  # a stage with rankers has groups
        images = torch.cat([part for _, part in sorted(self._decoded, key=lambda at: at[0].start)])
        texts, everything = [p.text for p in self._prompts], slice(0, len(images))
        for ranker, thread in self._rankers:
            asked = (ranker, images, texts, self._groups)
            if thread is None:
                self._keep(everything, {ranker.name: ranked(*asked)})
            else:
                self._later.append((ranker.name, everything, thread.call(ranked, *asked)))

    def finish(self, step: int) -> Scored:
        """Every reward of the global batch, of iteration `step`; one gather joins the ranks'.

        Raises:
            NonFiniteScore: if a score is not finite; NonFiniteError on the other ranks.
        """
        try:
            for name, rows, future in self._later:
                self._keep(rows, {name: future.result()})
        except NonFiniteScore as error:
            self._problem = self._problem or error
        share, names = self._scorer.share, self._names
        table = share.ranks.gather(self._mine, share.batch)
        if not bool(torch.isfinite(table).all()):
            message = f"step {step}: a reward on another rank is not finite"
            raise self._problem or NonFiniteError(message)
        scores = dict(zip(names, table.unbind(1), strict=True))
        return Scored(scores, self._losses, self._gradient)

    def _total(self, images: Tensor, rows: slice) -> Tensor:
        assert self._here is not None  # what is back-propagated is here
        if self._scorer.rounded:  # the gradient is at the image itself, so it has a pass of its own
            self._plain(images, rows)
            return self._here.gradient_total(images, *_of(self._prompts[rows]))
        self._send(images, rows)
        total, scores = self._here.differentiable_total(images, *_of(self._prompts[rows]))
        self._keep(rows, scores)
        self._look(images, rows, scores)
        return total

    def _plain(self, images: Tensor, rows: slice) -> None:
        self._send(images, rows)
        if self._here is not None:
            shown = self._scorer.shown(images)
            scores = self._here.score(shown, *_of(self._prompts[rows]))
            self._keep(rows, scores)
            self._look(shown, rows, scores)

    def _look(self, images: Tensor, rows: slice, scores: Mapping[str, Tensor]) -> None:
        assert self._here is not None
        for item in self._here.rewards:
            about = _of(self._prompts[rows])
            self._scorer.examined.look(item.reward, images, *about, scores[item.reward.name])

    def _send(self, images: Tensor, rows: slice) -> None:
        """To the rewards elsewhere, and kept for the rankers, from host memory: their threads leave
        the device alone."""
        if self._threads or self._rankers:
            there = (self._scorer.shown(images).detach().cpu(), *_of(self._prompts[rows]))
            if self._rankers:
                self._decoded.append((rows, there[0]))
            for reward, thread in self._threads:
                self._later.append((reward.name, rows, thread.call(checked, reward, *there)))

    def _keep(self, rows: slice, scores: Mapping[str, Tensor]) -> None:
        for name, values in scores.items():
            self._mine[rows, self._names.index(name)] = values.to(self._mine)


def _of(prompts: Sequence[Prompt]) -> tuple[list[str], list]:
    return [p.text for p in prompts], [p.metadata for p in prompts]

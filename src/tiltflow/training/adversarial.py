"""The builtin term `gan`: DMD2's discriminator, a head on the fake score's features.

It learns to tell the teacher's samples from the generator's, both re-noised to levels of their own;
the generator descends −log D. In DMD2 (arXiv 2405.14867) the other side is a data set, which there
need not be here: the teacher's own guided samples are in its place, as in LADD (arXiv 2403.12015).
And there the features learn with the head; here the fake score is trained by its own loss alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn

from tiltflow.core.distributed import shared
from tiltflow.core.randomness import Randomness
from tiltflow.core.settings import Rate, Section, Steps, Weight
from tiltflow.core.transfer import to_device
from tiltflow.flow import interpolate, renoise_level
from tiltflow.method.adversarial import realism_loss, unreality_loss
from tiltflow.method.rollout import rollout
from tiltflow.models.backbone import Conditioning
from tiltflow.models.roles import Role
from tiltflow.training.optim import Updater
from tiltflow.training.parts import Parts
from tiltflow.training.terms import Attached, Epoch, Loss, Span, Term, single

WIDTH = 128


class Head(nn.Module):
    """A logit a sample (b,) from features (b, ..., c): an MLP of each place, their mean."""

    def __init__(self, channels: int, randomness: Randomness) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.hidden, self.out = nn.Linear(channels, WIDTH), nn.Linear(WIDTH, 1)
        for number, layer in enumerate((self.hidden, self.out)):
            drawn = randomness.normal("gan/head", number, tuple(layer.weight.shape))
            layer.weight.data.copy_(drawn / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        each = self.out(nn.functional.silu(self.hidden(self.norm(features.float()))))
        return each.flatten(1).mean(1)


class Features:
    """What the middle block of a velocity network gives, (b, ..., c), on its way to the velocity.

    The middle of the longest list of blocks, of two the larger; of a block that gives several
    streams, the last, the image's. Where one stream is filled up to the batch's longest prompt, the
    image's places of it: a sample's features are its own.

    Raises:
        ValueError: if the network has no list of blocks.
    """

    def __init__(self, role: Role) -> None:
        lists = [m for m in role.network.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        if not lists:
            raise ValueError("the fake score's network has no list of blocks")
        blocks = max(lists, key=lambda each: (len(each), sum(p.numel() for p in each.parameters())))
        self.role, self.block = role, blocks[(len(blocks) - 1) // 2]
        self.places = getattr(role.backbone, "image_places", None)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        found: list[Tensor] = []

        def seen(module: nn.Module, given: object, made: Tensor | tuple[Tensor, ...]) -> None:
            found.append(made if isinstance(made, Tensor) else made[-1])

        handle = self.block.register_forward_hook(seen)
        try:
            with torch.enable_grad():  # without, a recorded pass might be replayed past the hook
                self.role(x, sigma, cond)
        finally:
            handle.remove()
        return found[0] if self.places is None else self.places(found[0])


class Adversary(Term):
    """weight · −log D at the rollout's end, D's update before it (DMD2, arXiv 2405.14867).

    Raises:
        ValueError: as `Features`, or if ranks that share the base would call it unequally often.
    """

    name = "the adversarial loss"

    class Settings(Section):
        """`lr`: the head's rate (AdamW); `real_steps`: the teacher's, of the ODE; `one_in`: of so
        many samples one has a teacher's sample for its prompt beside it."""

        weight: Weight = 1.0
        lr: Rate = 1e-3
        real_steps: Steps = 25
        one_in: Steps = 4

    def __init__(self, parts: Parts, settings: Settings) -> None:
        self.parts, self.settings = parts, settings
        mine, every = len(parts.share), settings.one_in
        if mine % every and shared(parts.roles.teacher.network):
            raise ValueError(
                f"one_in {every} does not divide a rank's {mine} samples, so that some "
                "ranks would ask the teacher more often than others, which run.sharding=fsdp2 does "
                "not allow: give another one_in or train.batch_size"
            )
        backbone = parts.roles.generator.backbone
        self.features = Features(parts.roles.fake_score.at(parts.steps))
        self.sigmas = to_device(backbone.teacher_sigmas(settings.real_steps), backbone.device)
        cond, _ = parts.prompts.select([0], backbone.device)
        zeros = torch.zeros(1, *parts.latent_shape, device=backbone.device)
        channels = self.features(zeros, zeros.new_full((1,), 0.5), cond).shape[-1]
        self.head = Head(channels, parts.randomness).to(backbone.device)
        role = Role("gan_head", backbone, self.head, parameters=dict(self.head.named_parameters()))
        self.updater = Updater(role, settings.lr, ranks=parts.share.ranks, guard=parts.guard)

    @classmethod
    def passes(cls, steps: int, **settings: object) -> int:
        return 2

    @property
    def updaters(self) -> Mapping[str, Updater]:
        return {"gan_head": self.updater}

    def spans(self, step: int) -> tuple[Span, ...]:
        return (single(self.parts.steps - 1),) if self.settings.weight else ()

    def begin(self, epoch: Epoch) -> Loss:
        fake = self._noised(epoch.trajectory.end, "fake", epoch.step)
        lost = self._learn(epoch, fake)
        gradients, losses = [], []
        for rows in self.parts.share.micro_batches():
            x = epoch.trajectory.end[rows].detach().requires_grad_()
            t, noise = fake[0][rows], fake[1][rows]
            cond = epoch.trajectory.rows(rows).conditioning
            with torch.enable_grad():
                each = realism_loss(self.head(self.features(interpolate(x, noise, t), t, cond)))
                gradients.append(torch.autograd.grad(each.sum(), x)[0])
            losses.append(each.detach())
        gradient, realism = torch.cat(gradients), torch.cat(losses)

        def loss(at: Attached) -> tuple[Tensor, dict[str, Tensor]]:
            rows = at.rows
            pull = self.settings.weight * (at.x * gradient[rows]).flatten(1).sum(1)
            return pull, {"generator/gan": realism[rows], "gan/head": lost[rows]}

        return loss

    def _learn(self, epoch: Epoch, fake: tuple[Tensor, Tensor]) -> Tensor:
        """One update of the head; its loss of each sample (b,)."""
        parts, end = self.parts, epoch.trajectory.end
        share, every = parts.share, self.settings.one_in
        real_noise, count = self._noised(end, "real", epoch.step), -(-share.batch // every)
        lost = torch.zeros(len(end), device=end.device)
        for rows in share.micro_batches():
            cond = epoch.trajectory.rows(rows).conditioning
            each = unreality_loss(self._logits(end[rows], fake, rows, cond))
            (each.sum() / share.batch).backward()
            first = share.rows.start + rows.start
            beside = [row for row in range(len(each)) if (first + row) % every == 0]
            total = each.detach()
            if beside:
                where = [rows.start + row for row in beside]
                numbers = [epoch.step * share.batch + first + row for row in beside]
                x = self._taught(numbers, cond[beside])
                told = realism_loss(self._logits(x, real_noise, where, cond[beside]))
                (told.sum() / count).backward()
                total[beside] += told.detach() * share.batch / count
            self.updater.watch("the discriminator's loss", total, epoch.prompts[rows])
            lost[rows] = total
        self.updater.apply(epoch.step)
        return lost

    def _logits(
        self, x: Tensor, noised: tuple[Tensor, Tensor], rows: slice | list[int], cond: Conditioning
    ) -> Tensor:
        """D's, with a graph of the head alone."""
        t, noise = noised[0][rows], noised[1][rows]
        features = self.features(interpolate(x, noise, t), t, cond).detach()
        return self.head(features)

    def _noised(self, end: Tensor, which: str, step: int) -> tuple[Tensor, Tensor]:
        """Levels (b,) and noises (b, ...) of this rank's rows."""
        share, random = self.parts.share, self.parts.randomness
        uniform = share.of(random.uniform(f"gan/{which}/t", step, (share.batch,)), end.device)
        noise = share.noise(random, f"gan/{which}/noise", step, end.shape[1:], end.device)
        return renoise_level(torch.zeros_like(uniform), uniform), noise

    def _taught(self, numbers: list[int], cond: Conditioning) -> Tensor:
        """The teacher's samples of these numbers, with its guidance, by Euler's steps."""
        parts = self.parts
        drawn = [parts.randomness.normal("gan/init", n, parts.latent_shape) for n in numbers]
        x = to_device(torch.stack(drawn), parts.roles.teacher.backbone.device)

        def teacher(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            return parts.roles.teacher(x, sigma, cond, parts.matching.guidance)

        return rollout(teacher, x, self.sigmas, cond, 0.0, _none, keep=()).end


def _none(k: int) -> NoReturn:
    raise AssertionError("the ODE draws no noise")

"""Both stages written straightforwardly, as a measure for what the library's form of them saves.

Every role is a network of its own with its own adapter; fp32 unless autocast is asked for; each
iteration makes a fresh rollout with a random stop; guidance takes two passes and the consistency
transitions one each; all states are kept; and the host reads every loss. The formulas are the
library's (`flow`, `objectives`), and so are the numbers of updates.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.config.load import RunConfig
from tiltflow.data.prompts import Prompt
from tiltflow.flow import (
    cps_mean_std,
    cps_step,
    fake_score_loss,
    renoise,
    renoise_level,
    x0_from_velocity,
)
from tiltflow.method.distribution_matching import matching_gradient, matching_loss
from tiltflow.method.policy import clipped_surrogate, group_advantages, share_in_groups
from tiltflow.method.rollout import log_prob
from tiltflow.models.backbone import Backbone, Conditioning
from tiltflow.models.roles import AdapterSettings, add_adapter
from tiltflow.rewards.combine import RewardMixture


@dataclass
class Player:
    """One role: its own network, its adapter's weights and its optimizer."""

    network: nn.Module
    backbone: Any
    parameters: Mapping[str, nn.Parameter]
    precision: torch.dtype | None
    optimizer: torch.optim.Optimizer | None = None

    def __call__(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float = 1.0
    ) -> Tensor:
        forward = self.backbone._forward
        with torch.autocast("cpu", self.precision) if self.precision else nullcontext():
            conditional = forward(self.network, x, sigma, cond.positive)
            if guidance == 1.0:
                return conditional
            plain = forward(self.network, x, sigma, cond.negative)
        return plain + guidance * (conditional - plain)

    def step(self, loss: Tensor) -> float:
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError("the gradient is not finite")
        self.optimizer.step()
        return float(norm)


def player(
    backbone: Any,
    settings: AdapterSettings | None,
    lr: float | None,
    precision: torch.dtype | None,
) -> Player:
    """A copy of the base, with an adapter where `settings` are given, trained where `lr` is."""
    network = copy.deepcopy(backbone.teacher_base)
    if settings is None:
        return Player(network, backbone, {}, precision)
    own = add_adapter(network, "own", settings, seed=0, trainable=lr is not None)
    network.set_adapter("own")
    for parameter in own.values():
        parameter.requires_grad_(lr is not None)
    optimizer = None if lr is None else torch.optim.AdamW(list(own.values()), lr=lr)
    return Player(network, backbone, own, precision, optimizer)


class Plain:
    """Teacher, generator, fake score and average of a recipe, and its two kinds of iteration."""

    def __init__(
        self,
        cfg: RunConfig,
        backbone: Backbone,
        settings: AdapterSettings,
        precision: torch.dtype | None = None,
    ) -> None:
        self.cfg, self.backbone = cfg, backbone
        self.teacher = player(backbone, None, None, precision)
        self.generator = player(backbone, settings, cfg.train.generator_lr, precision)
        self.fake = player(backbone, settings, cfg.train.fake_score_lr, precision)
        self.ema = player(backbone, settings, None, precision)
        self.sigmas = backbone.few_step_sigmas(cfg.sampler.steps)
        self.eta, self.guidance = cfg.sampler.eta, float(cfg.model.guidance or backbone.guidance)

    def noise(self) -> Tensor:
        return torch.randn(self.cfg.train.batch_size, *self.backbone.latent_shape)

    def level(self, k: int) -> Tensor:
        return self.sigmas[k].expand(self.cfg.train.batch_size)

    def mean_std(self, x: Tensor, k: int, cond: Conditioning) -> tuple[Tensor, Tensor]:
        v = self.generator(x, self.level(k), cond)
        return cps_mean_std(x, v, self.level(k), self.level(k + 1), self.eta)

    @torch.no_grad()
    def rollout(
        self, cond: Conditioning, stop: int, noise: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The states of `stop` steps, and each step's log-probability."""
        states, probabilities = [self.noise()], []
        for k in range(stop):
            mean, std = self.mean_std(states[-1], k, cond)
            states.append(mean + std * noise[k] if self.sigmas[k + 1] > 0 else mean)
            probabilities.append(log_prob(states[-1], mean, std, "unit"))
        return states, probabilities

    def fake_update(
        self, x_s: Tensor, s: Tensor, cond: Conditioning, weight: float
    ) -> dict[str, float]:
        """One update of the fake score: the ambient loss and the consistency regulariser."""
        t, noise = renoise_level(s, torch.rand(len(s))), self.noise()
        x_t = renoise(x_s, s, t, noise)
        v_t = self.fake(x_t, t, cond)
        loss = fake_score_loss(v_t, x_s, s, t, noise).mean()
        if weight > 0:
            then = (t - torch.randint(1, 201, (len(t),)) / 1000).clamp(min=0)
            here = x0_from_velocity(x_t, v_t, t)
            gaps = []
            for _ in range(2 if self.cfg.cold_start.consistency_form == "two_sample" else 1):
                moved = cps_step(x_t, v_t, t, then, self.eta, self.noise()).detach()
                gaps.append(x0_from_velocity(moved, self.fake(moved, then, cond), then) - here)
            loss = loss + weight * (gaps[0] * gaps[-1]).mean()
        value = loss.item()
        return {"fake_score": value, "norm": self.fake.step(loss)}

    def matching(self, x_s: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
        t = renoise_level(s, torch.rand(len(s)))
        return matching_gradient(
            x_s, s, t, self.noise(), self.noise(),
            lambda x, sigma: self.teacher(x, sigma, cond, self.guidance),
            lambda x, sigma: self.fake(x, sigma, cond), self.eta,
        )  # fmt: skip

    @torch.no_grad()
    def average(self) -> None:
        for name, slow in self.ema.parameters.items():
            slow.mul_(self.cfg.train.ema).add_(
                self.generator.parameters[name], alpha=1 - self.cfg.train.ema
            )

    def cold_start(self, step: int, cond: Conditioning, stop: int) -> dict[str, float]:
        """One iteration of stage 1 on a batch of prompts, at the boundary after step `stop`."""
        chosen = self.cfg.cold_start
        states, _ = self.rollout(cond, stop, [self.noise() for _ in range(stop)])
        s = self.level(stop)
        seen = self.fake_update(states[-1], s, cond, chosen.consistency)
        if (step + 1) % chosen.generator_every == 0:
            gradient = self.matching(states[-1], s, cond)
            mean, _ = self.mean_std(states[-2], stop - 1, cond)
            loss = matching_loss(mean + (states[-1] - mean).detach(), gradient).mean()
            seen |= {"matching": loss.item(), "generator_norm": self.generator.step(loss)}
            self.average()
        return seen

    def tilt(
        self, cond: Conditioning, prompts: list[Prompt], rewards: RewardMixture
    ) -> dict[str, float]:
        """One epoch of stage 2 on a batch of prompts in groups."""
        chosen, last = self.cfg.tilt, len(self.sigmas) - 2
        trained = sorted(torch.randperm(last)[: chosen.subset].tolist())
        noise = [self.noise() for _ in range(last + 1)]
        for k in set(range(last)) - set(trained):
            noise[k] = share_in_groups(noise[k], chosen.group_size)
        states, old = self.rollout(cond, last + 1, noise)
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        with torch.no_grad():
            scores = rewards.score(self.backbone.decode(states[-1]), texts, metadata)
        advantages, _ = group_advantages(scores, rewards.weights, chosen.group_size)
        at = int(torch.randint(last + 1, ())) if chosen.match_steps == "random" else last
        seen = self.fake_update(states[at + 1], self.level(at + 1), cond, chosen.consistency)
        gradient = self.matching(states[at + 1], self.level(at + 1), cond)
        loss = torch.zeros(())
        for k in trained:
            mean, std = self.mean_std(states[k], k, cond)
            now = log_prob(states[k + 1], mean, std, "unit")
            policy = clipped_surrogate(now, old[k], advantages, chosen.clip_range).mean()
            loss = loss + chosen.policy_weight * policy / len(trained)
        mean, _ = self.mean_std(states[at], at, cond)
        matching = matching_loss(mean + (states[at + 1] - mean).detach(), gradient).mean()
        x0, _ = self.mean_std(states[last], last, cond)
        total, _ = rewards.differentiable_total(self.backbone.decode(x0), texts, metadata)
        pull = torch.relu(chosen.reward_target - total).mean()
        loss = loss + chosen.matching_weight * matching + chosen.reward_weight * pull
        seen |= {"matching": matching.item(), "pull": pull.item()}
        seen["generator_norm"] = self.generator.step(loss)
        self.average()
        return seen

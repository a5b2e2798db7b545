"""One network of ours and the same of the authors': equal weights, and how far they come apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.models.backbone import Conditioning
from tiltflow.training.optim import Updater

Weights = Mapping[str, Tensor]
STD_A, STD_B = 0.03, 0.1
"""Of the random adapters. Of a B of 0, the start of training, A has no gradient; with a small one
student and teacher are so alike that rounding is much of the little that they differ."""


@dataclass
class Beside:
    """`gradients` are those of the last optimizer's step of each, clipped as it is."""

    ours: Weights
    theirs: Weights
    start: Weights
    gradients: dict[str, Weights] = field(default_factory=dict)

    @classmethod
    def of(cls, updater: Updater, network: nn.Module, optimizer: Any, random: Any) -> Beside:
        """A role of ours by its updater, and their network with its optimizer."""
        ours = updater.role.parameters
        draw(ours, random)
        start = {name: value.detach().clone() for name, value in ours.items()}
        made = cls(ours, adapters(network, ours), start)
        copy_to(made.theirs, ours)
        for side, weights, steps in (
            ("ours", ours, updater.optimizer),
            ("theirs", made.theirs, optimizer),
        ):
            steps.register_step_pre_hook(made._catch(side, weights))
        return made

    def _catch(self, side: str, weights: Weights) -> Any:
        def hook(*_: object) -> None:
            found = {name: value.grad for name, value in weights.items()}
            self.gradients[side] = {k: v.clone() for k, v in found.items() if v is not None}

        return hook

    def gradient(self) -> float:
        """The relative difference of the last gradients, which are taken away."""
        return relative(self.gradients.pop("ours"), self.gradients.pop("theirs"))

    def change(self) -> float:
        """The relative difference of how far all weights have gone from the start.

        Of all, not the largest: Adam takes a weight with no gradient but rounding a whole step
        either way.
        """
        ours, theirs = (
            {name: value.detach() - self.start[name] for name, value in side.items()}
            for side in (self.ours, self.theirs)
        )
        return relative(ours, theirs)


def adapters(network: nn.Module, ours: Weights) -> dict[str, Tensor]:
    """The adapter of their network, by the names that it has here."""
    named = {k.replace(".default.", "."): v for k, v in network.named_parameters() if "lora_" in k}
    assert set(named) == set(ours), f"adapters differ: {sorted(set(named) ^ set(ours))[:3]}"
    return named


@torch.no_grad()
def draw(weights: Weights, random: torch.Generator) -> None:
    for name, value in weights.items():
        std = STD_A if ".lora_A." in name else STD_B
        value.copy_(std * torch.randn(value.shape, generator=random))


@torch.no_grad()
def copy_to(theirs: Weights, ours: Weights) -> None:
    for name, value in ours.items():
        theirs[name].copy_(value)


def relative(ours: Weights, theirs: Weights) -> float:
    """The norm of the difference over theirs."""
    assert set(ours) == set(theirs)
    apart = [(ours[name] - value).flatten() for name, value in theirs.items()]
    whole = [value.flatten() for value in theirs.values()]
    return float(torch.cat(apart).norm().detach() / torch.cat(whole).norm().detach())


def their_embeddings(model: str, cond: Conditioning) -> list[tuple[Tensor, Tensor]]:
    """Of the prompts and of the empty one, as their transformers take them."""
    both = [dict(cond.positive), {k: v[:1] for k, v in cond.negative.items()}]
    if model == "klein":
        places = import_module("rtdmd.models.flux2_klein")._prepare_text_ids
        return [(each["prompt_embeds"], places(each["prompt_embeds"])) for each in both]
    return [(each["prompt_embeds"], each["pooled_prompt_embeds"]) for each in both]

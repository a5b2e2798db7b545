"""LoRA adapters on a network: their shape, how they start, and where they lie."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from tiltflow.low_rank import fused


@dataclass(frozen=True)
class AdapterSettings:
    """A LoRA: rank, α (the update is scaled by α / rank) and the modules it goes on."""

    rank: int
    alpha: float
    targets: str | list[str]

    def config(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # scaling takes any number
            target_modules=self.targets,
            init_lora_weights="gaussian",
        )


def add_adapter(
    network: nn.Module, name: str, settings: AdapterSettings, seed: int, trainable: bool
) -> dict[str, nn.Parameter]:
    """A new fp32 adapter (A Gaussian, B zero) and its parameters by canonical name."""
    before = {n for n, p in network.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT warns of several adapters on one model, which is the point here
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(seed)
        call(network, "add_adapter", fused(settings.config()), adapter_name=name)
    mine = {}
    for full, parameter in network.named_parameters():
        if f".{name}." in full:
            parameter.data = parameter.data.float()
            mine[full.replace(f".{name}.", ".")] = parameter
        # add_adapter froze the other adapters
        parameter.requires_grad_(trainable if f".{name}." in full else full in before)
    return mine


def call(network: nn.Module, method: str, *args: Any, **kwargs: Any) -> None:
    """A method that diffusers' models have and `nn.Module` does not declare.

    Raises:
        ValueError: if this network lacks it.
    """
    found = getattr(network, method, None)
    if found is None:
        raise ValueError(f"a {type(network).__name__} has no {method}: use adapters.kind=copies")
    found(*args, **kwargs)

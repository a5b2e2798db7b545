"""LoRA adapters on a network: their shape, how they start, and where they lie."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiltflow.core.randomness import Randomness
from tiltflow.core.sentences import first_sentence

if TYPE_CHECKING:  # PEFT takes seconds to import, which what has no adapters need not wait for
    from peft import LoraConfig


@dataclass(frozen=True)
class AdapterSettings:
    """A LoRA: rank, α (the update is scaled by α / rank) and the modules it goes on."""

    rank: int
    alpha: float
    targets: str | list[str]

    def config(self, drawn: bool = True) -> LoraConfig:
        """PEFT's; `drawn` False leaves the weights as they come, where they have shapes only."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # scaling takes any number
            target_modules=self.targets,
            init_lora_weights="gaussian" if drawn else False,
        )


def adapter_seed(seed: int, stage: str, name: str) -> int:
    """The seed of an adapter's start: a draw for each run seed, stage and adapter (METHOD §8).

    Stage 2's adapter lies on stage 1's. Of one draw, their A's would read the same directions of
    the input, and the two together would have the rank of one.
    """
    return Randomness(seed).generator(f"adapter/{stage}/{name}", 0).initial_seed()


def add_adapter(
    network: nn.Module,
    name: str,
    settings: AdapterSettings,
    seed: int,
    trainable: bool,
    std: float | None = None,
) -> dict[str, nn.Parameter]:
    """A new fp32 adapter (A Gaussian, B zero) and its parameters by canonical name.

    A has standard deviation 1/rank, or `std`: the first updates move B alone, and the weights by
    B A, so that a rate of the optimizer means a step that is proportional to it. It is drawn in
    fp32 on the CPU whatever the base is kept in.

    Raises:
        ValueError: if the network has no such modules.
    """
    from tiltflow.models.low_rank import fused

    before = {n for n, p in network.named_parameters() if p.requires_grad}
    drawn = not next(network.parameters()).is_meta
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT warns of several adapters on one model, which is the point here
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(seed)
        try:
            call(network, "add_adapter", fused(settings.config(drawn)), adapter_name=name)
        except ValueError as error:
            raise ValueError(f"adapters.targets: {first_sentence(error)}") from error
    mine = {}
    for full, parameter in network.named_parameters():
        if f".{name}." in full:
            parameter.data = parameter.data.float()
            if std is not None and ".lora_A." in full:
                parameter.data *= std * settings.rank
            mine[full.replace(f".{name}.", ".")] = parameter
        # add_adapter froze the other adapters
        parameter.requires_grad_(trainable if f".{name}." in full else full in before)
    return mine


def frozen_below(
    network: nn.Module, name: str, settings: AdapterSettings, weights: Mapping[str, Tensor]
) -> dict[str, nn.Parameter]:
    """An adapter with these weights that nothing trains, for fresh ones to lie on (METHOD §5).

    Stage 2 stacks: a network's value is base + frozen stage-1 adapter + fresh adapter, each a
    product of its own. That is the same function as the stage-1 adapter merged into the base's
    matrices, without the merge's rounding, and the teacher on the same base stays what it is.

    Raises:
        ValueError: if the weights are not of this network and shape.
    """
    parameters = add_adapter(network, name, settings, 0, trainable=False)
    load_weights(name, parameters, weights)
    return parameters


@torch.no_grad()
def load_weights(
    role: str, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Copies weights into a role's parameters.

    Raises:
        ValueError: if names or shapes are not the role's.
    """
    missing = sorted(set(parameters) ^ set(state))
    if missing:
        raise ValueError(
            f"weights of role {role!r} do not match, e.g. {missing[0]!r}: they are of "
            "another model or other adapters"
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"{name!r} of role {role!r} is {tuple(parameter.shape)} here but "
                f"{tuple(state[name].shape)} in the weights to load"
            )
        parameter.copy_(state[name])


def call(network: nn.Module, method: str, *args: Any, **kwargs: Any) -> None:
    """A method that diffusers' models have and `nn.Module` does not declare.

    Raises:
        ValueError: if this network lacks it.
    """
    found = getattr(network, method, None)
    if found is None:
        raise ValueError(f"a {type(network).__name__} has no {method}: use adapters.kind=copies")
    found(*args, **kwargs)

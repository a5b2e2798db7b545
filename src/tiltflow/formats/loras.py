"""The LoRAs of an export: each adapter by itself, and both in one at a strength of the tilt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tiltflow.core.checkpoint import Checkpoint
from tiltflow.formats.contract import Contract
from tiltflow.formats.writing import baked, exported_adapters
from tiltflow.models.lora_files import exactly
from tiltflow.models.roles import AdapterSettings
from tiltflow.models.switch import FEW_STEP, TILT

SINGLE = (FEW_STEP, TILT)
"""The adapters by themselves."""


@dataclass(frozen=True)
class Lora:
    """A LoRA with α = rank by canonical name, and the contract that its file carries."""

    name: str
    weights: Mapping[str, Tensor]
    settings: AdapterSettings
    contract: Contract


def loras_of(
    checkpoint: Checkpoint, contract: Contract, strengths: Sequence[float] = ()
) -> list[Lora]:
    """`few_step`, from stage 2 `tilt`, and for each strength `baked_STRENGTH`: few_step and
    strength times tilt as one LoRA, whose rank is the sum of theirs.

    Raises:
        ValueError: if the run trained copies, which have no adapters.
    """
    single = {
        name: baked(checkpoint.tensors[group], settings)
        for name, (group, settings) in exported_adapters(checkpoint.state).items()
    }
    made = [Lora(name, *adapter, contract) for name, adapter in single.items()]
    for strength in strengths:
        weights, settings = both(single[FEW_STEP], single[TILT], strength)
        own = contract.model_copy(update={"tilt": strength})
        made.append(Lora(f"baked_{strength:g}", weights, settings, own))
    return made


Adapter = tuple[Mapping[str, Tensor], AdapterSettings]


def both(few_step: Adapter, tilt: Adapter | None, strength: float) -> Adapter:
    """B₁A₁ + strength · B₂A₂ as one LoRA with α = rank; both have α = rank. At 0, or without the
    second, it is the first.

    A module that only one of them has is filled up with zeros to the common rank.
    """
    if tilt is None or strength == 0:
        return few_step
    (below, first), (above, second) = few_step, tilt
    modules = list(dict.fromkeys(n.rsplit(".lora_", 1)[0] for n in (*below, *above)))
    weights: dict[str, Tensor] = {}
    for module in modules:
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        downs = [w[a] for w in (below, above) if a in w]
        ups = [w[b] * s for w, s in ((below, 1.0), (above, strength)) if b in w]
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        missing = first.rank + second.rank - len(down)
        weights[a], weights[b] = F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))
    targets = first.targets if first.targets == second.targets else exactly(modules)
    rank = first.rank + second.rank
    return weights, replace(first, rank=rank, alpha=rank, targets=targets)

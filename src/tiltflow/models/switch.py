"""Which adapters of a network are active, and how strong they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:  # PEFT takes seconds to import, which what has no adapters need not wait for
    from peft.tuners.tuners_utils import BaseTunerLayer

    from tiltflow.models.low_rank import Copies

FEW_STEP, TILT = "few_step", "tilt"
"""The adapters of stage 1 and stage 2, as exports name them."""


def alone(own: str) -> tuple[str, ...]:
    """The adapters of a generator of stage 1."""
    return (own,)


def stack_tilt(own: str = TILT) -> tuple[str, ...]:
    """The adapters of a tilted generator: stage 2's `own` on stage 1's, over one base.

    What they compute is base + few_step + strength · tilt, each a product of its own, so that
    neither the teacher nor the few-step student changes by the tilt, and `AdapterSwitch.scale`
    turns it from 0 (stage 1's student) to 1 (as trained) and beyond.
    """
    return (FEW_STEP, own)


class AdapterSwitch:
    """Flips the active adapters of a network, and nothing else.

    PEFT's own `set_adapter` and `enable_adapters` also change `requires_grad`, which loses the
    gradient of a graph built under another adapter and unfreezes frozen ones. What a set of
    adapters makes of a layer is prepared at its first use, which must come after all adapters.
    """

    def __init__(self, network: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
        self.active: tuple[str, ...] | None = None
        self.copies: dict[str, Copies] = {}
        self._states: dict[tuple[str, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
        self.set(())

    def set(self, names: tuple[str, ...]) -> None:
        if names == self.active:
            return
        if names not in self._states:
            self._states[names] = [(vars(layer), self._of(layer, names)) for layer in self.layers]
        for attributes, state in self._states[names]:
            attributes.update(state)
        self.active = names

    def _of(self, layer: BaseTunerLayer, names: tuple[str, ...]) -> dict[str, Any]:
        """A layer's attributes under these adapters."""
        from tiltflow.models.low_rank import FusedLinear

        state = {"_disable_adapters": not names, "_active_adapter": list(names)}
        vars(layer).update(state)
        if isinstance(layer, FusedLinear):
            state["parts"] = layer.active_parts(self.copies)
        return state

    def scale(self, name: str, strength: float) -> None:
        """An adapter's part is α / rank times `strength` from here on, whatever it was before; a
        recorded graph (`Role.graphs`) keeps the one that it was recorded with.

        Raises:
            ValueError: if it is a DoRA, whose magnitudes act in full at every strength, 0 too.
        """
        from peft.tuners.lora import LoraLayer

        for layer in self.layers:
            if isinstance(layer, LoraLayer) and name in layer.scaling:
                if strength != 1 and layer.use_dora.get(name):
                    raise ValueError(
                        f"the LoRA for {name} is a DoRA, of which a strength turns only a part: it "
                        f"goes at 1, not at {strength:g}"
                    )
                layer.set_scale(name, strength)
        active, self.active = self.active or (), None
        self._states.clear()
        self.copies.clear()
        self.set(active)

    def refresh(self, names: tuple[str, ...]) -> None:
        """Brings what the layers compute with up to the adapters' present weights."""
        for name in names:
            if name in self.copies:
                self.copies[name].refresh()

    @contextmanager
    def use(self, names: tuple[str, ...]) -> Iterator[None]:
        before = self.active or ()
        self.set(names)
        self.refresh(names)
        try:
            yield
        finally:
            self.set(before)

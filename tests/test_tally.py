"""Memory counted as operations run, and their results on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from tiltflow.setup import tally as tally_module
from tiltflow.setup.tally import Tally


def test_tally_counts_what_is_alive() -> None:
    held = torch.zeros(1000)
    with Tally(held) as tally:
        a = torch.zeros(256)
        b = a.view(2, 128).t() + 1
        assert tally.live == tally.peak == 2048
        del a
        assert tally.live == 1024
        c = (held + b.sum()).sum()
        assert tally.peak >= 1024 + 4000
        del b, c
    assert tally.live <= 8


def attention(x: Tensor) -> Tensor:
    q = x.view(2, 4, 3, 2).transpose(1, 2)
    return functional.scaled_dot_product_attention(q, q, q)


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "elementwise": lambda x: x * 2 + x,
    "integers stay integers": lambda x: x.long() * 2,
    "a float makes floats of integers": lambda x: x.long() * 2.0,
    "a truth keeps truths": lambda x: (x > 0) * True,
    "a number makes integers of truths": lambda x: (x > 0) * 1,
    "strides of what it is given": lambda x: x.t() * 2,
    "a view": lambda x: x.view(4, 12).t(),
    "a view that does not say so": lambda x: torch.ops.aten._unsafe_view(x, [4, 12]),
    "in place": lambda x: x.mul_(2),
    "in place, with other sizes after": lambda x: x.clone().t_(),
    "several results": lambda x: torch.ops.aten.native_layer_norm(x, [6], None, None, 1e-5),
    "results of different types": lambda x: x.max(dim=1),
    "nothing given": lambda x: torch.zeros(3, 5, device="meta", dtype=torch.half),
    "nothing in it": lambda x: x[:0] * 2,
    "convolution": lambda x: functional.conv2d(x.view(1, 2, 4, 6), x[:2].view(3, 2, 2, 1)),
    "attention": attention,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_result_known_by_its_shape_is_the_operations_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes, strides, types, what is shared with what is given, and the memory."""

    def seen(of: Callable[[Tensor], Any]) -> tuple[object, ...]:
        with Tally() as tally:
            x = torch.ones(8, 6, device="meta")
            made = [t for t in tree_leaves(of(x)) if isinstance(t, Tensor)]
            shared = [t.untyped_storage()._cdata == x.untyped_storage()._cdata for t in made]
            live = tally.live
        forms = [(t.shape, t.stride(), t.dtype, t.device, t.storage_offset()) for t in made]
        return forms, shared, live, tally.peak

    operation = OPERATIONS[name]
    with monkeypatch.context() as plain:
        plain.setattr(tally_module, "result_of", lambda func, args, kwargs: func(*args, **kwargs))
        expected = seen(operation)
    monkeypatch.setattr(tally_module, "_KNOWN", {})
    assert seen(operation) == expected
    count = len(tally_module._KNOWN)
    assert seen(operation) == expected and len(tally_module._KNOWN) == count


def test_known_results_go_through_backward() -> None:
    def gradient() -> Tensor:
        x = torch.ones(4, 3, device="meta", requires_grad=True)
        with Tally():
            functional.silu(x @ x.t()).sum().backward()
        assert x.grad is not None
        return x.grad

    first, second = gradient(), gradient()
    assert first.shape == second.shape == (4, 3) and first.is_meta and second.is_meta


def test_numbers_are_not_taken_for_shapes() -> None:
    """Outside the meta device every operation runs."""
    with Tally():
        assert [int((torch.tensor([n]) + 1).item()) for n in (1, 2)] == [2, 3]

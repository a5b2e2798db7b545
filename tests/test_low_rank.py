"""The fused LoRA layer against PEFT's own."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn

from tiltflow.models.low_rank import Copies, FusedLinear, fused
from tiltflow.training.optim import Updater

ADAPTERS = ("first", "second")


def pair(dropout: float = 0.0, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """One linear layer with two adapters: of PEFT's kind and of ours, with the same weights."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20, bias=bias)).requires_grad_(False)
    made = []
    for wrap in (lambda config: config, fused):
        network = copy.deepcopy(base)
        for rank, name in enumerate(ADAPTERS, 3):
            config = LoraConfig(
                r=rank,
                lora_alpha=1.7 * rank,
                target_modules=["0"],
                init_lora_weights=False,
                lora_dropout=dropout,
            )
            inject_adapter_in_model(wrap(config), network, name)
        made.append(network)
    made[1].load_state_dict(made[0].state_dict())
    for network in made:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora" in name)
    return made[0], made[1]


def use(network: nn.Module, names: list[str]) -> None:
    layer = network[0]  # type: ignore[index]
    layer._active_adapter, layer._disable_adapters = names, not names


def run(network: nn.Module, x: torch.Tensor, mixed: bool) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x and of all adapters."""
    network.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        y = network(x * 1.0)
    (y.float() ** 2).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return found | grads


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("active", [[], ["first"], ["second"], ["first", "second"]])
def test_output_and_gradients_are_pefts(active: list[str], mixed: bool, bias: bool) -> None:
    theirs, ours = pair(bias=bias)
    assert type(theirs[0]) is Linear and type(ours[0]) is FusedLinear  # type: ignore[index]
    x = torch.randn(2, 5, 12)
    found = []
    for network in (theirs, ours):
        use(network, active)
        found.append(run(network, x, mixed))
    assert set(found[0]) == set(found[1])
    assert len(found[0]) == 2 + 2 * len(active)
    for key, value in found[0].items():
        assert found[1][key].dtype == value.dtype
        error = (found[1][key] - value).float().norm() / value.float().norm()
        assert error < (2e-2 if mixed else 1e-6), (key, error)


def test_the_sum_is_no_pass_of_its_own() -> None:
    """What it is for: no full-size product with the scaling, no full-size addition."""
    theirs, ours = pair()
    counts = []
    for network in (theirs, ours):
        use(network, ["first"])
        with torch.profiler.profile() as seen:
            run(network, torch.randn(2, 5, 12), mixed=False)
        passes = {"aten::mul", "aten::add"}
        counts.append(sum(e.count for e in seen.key_averages() if e.key in passes))
    assert counts[1] < counts[0]


def test_dropout_is_left_to_peft() -> None:
    theirs, ours = pair(dropout=0.5)
    x = torch.randn(2, 5, 12)
    found = []
    for network in (theirs, ours):
        use(network, ["first"])
        torch.manual_seed(1)
        found.append(run(network.train(), x, mixed=False))
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("active", [["second"], ["first", "second"]])
def test_a_bf16_base_has_bf16_adapters_and_fp32_gradients(
    active: list[str], bias: bool, mixed: bool
) -> None:
    """PEFT adds fp32 adapters to a bf16 base in fp32; ours differ from that by bf16's rounding."""
    theirs, ours = pair(bias=bias)
    x = torch.randn(2, 5, 12).bfloat16()
    found = []
    for network in (theirs, ours):
        layer = network[0]  # type: ignore[index]
        layer.base_layer.bfloat16()
        layer.lora_A["first"].weight.requires_grad_(False)
        layer.lora_B["first"].weight.requires_grad_(False)
        use(network, active)
        copies: dict[str, Copies] = {}
        if isinstance(layer, FusedLinear):
            layer.parts = layer.active_parts(copies)
        for each in copies.values():
            each.refresh()
        found.append(run(network, x, mixed))
    assert set(found[0]) == set(found[1]) and len(found[0]) == 4  # y, x, and the second's own
    for key, value in found[0].items():
        assert found[1][key].dtype == value.dtype
        error = (found[1][key] - value).float().norm() / value.float().norm()
        assert error < 1e-2, (key, error)


def test_copies_follow_every_change_and_are_made_once() -> None:
    """A step of the updater, loading and averaging; nothing is cast without a change."""
    master = nn.Parameter(torch.randn(3, 4))
    role = SimpleNamespace(name="any", parameters={"a": master})
    updater = Updater(role, lr=0.1)  # type: ignore[arg-type]
    copies = Copies()
    copy = copies.of(master, torch.bfloat16)
    assert copies.of(master, torch.float32) is master

    def step() -> None:
        master.grad = torch.ones_like(master)
        updater.apply(0)

    def load() -> None:
        with torch.no_grad():
            master.copy_(torch.randn(3, 4))

    def average() -> None:
        with torch.no_grad():
            master.lerp_(torch.zeros(3, 4), torch.tensor(0.5))

    for change in (lambda: None, step, load, average):
        change()
        copies.refresh()
        assert torch.equal(copy, master.bfloat16())
        with torch.profiler.profile() as seen:
            copies.refresh()
        assert not any(event.key.startswith("aten::") for event in seen.key_averages())


def test_a_merged_adapter_is_counted_once() -> None:
    _, ours = pair()
    x = torch.randn(2, 5, 12)
    use(ours, ["first"])
    before = ours(x)
    ours[0].merge()  # type: ignore[index]
    torch.testing.assert_close(ours(x), before)
    ours[0].unmerge()  # type: ignore[index]
    torch.testing.assert_close(ours(x), before)


def test_what_was_prepared_gives_way_to_pefts_own_switches() -> None:
    """A layer whose adapters were prepared and are then switched by PEFT follows PEFT."""
    _, ours = pair()
    layer, x = ours[0], torch.randn(2, 5, 12)  # type: ignore[index]
    found = {}
    for name in ADAPTERS:
        use(ours, [name])
        found[name] = layer(x)
    use(ours, ["first"])
    layer.parts = layer.active_parts()
    assert torch.equal(layer(x), found["first"])
    layer.set_adapter("second")
    assert torch.equal(layer(x), found["second"])
    layer.parts = layer.active_parts()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))

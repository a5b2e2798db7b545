#!/usr/bin/env bash
# torch's fused optimizers change weights without telling autograd: a stale graph gives a wrong gradient, not an error.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6.
# Behaviour: autograd notices that a tensor which a graph has saved was changed in place by a counter on the tensor.
#   `AdamW`, `Adam`, `SGD` and `Adagrad` with `fused=True` write the weights and leave the counter as it was. A second
#   graph, built before `step` and run backwards after it, silently takes the new weights for the old ones.
# One would have guessed: the same RuntimeError ("modified by an inplace operation") that the default and the foreach form
#   raise on the same lines. `fused` is documented as the faster implementation of the same step.
# Who is hurt: loops with two losses over shared graphs (a discriminator's step between a generator's forward and
#   backward pass, a kept graph), for whom the error was the guard; and whoever asks the counter whether weights have
#   changed, to refresh a copy of them in another type.
# What helps: run every backward pass before `step`; where a cache asks the counter, turn it by hand after `step`.
#
# Output seen (2026-11-28):
#   default   counter +2  backward after step: RuntimeError
#   foreach   counter +2  backward after step: RuntimeError
#   fused     counter +0  backward after step: the gradient of the new weights, off by 0.52
#   fused Adam +0, SGD +0, Adagrad +0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q numpy==2.4.6
cat > "$work/try.py" <<'PY'
import torch
from torch import nn


def attempt(name: str, **form):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 3))
    x = torch.randn(2, 3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.5, **form)
    first, second = x @ weight.t(), x @ weight.t()
    right = torch.ones_like(second) @ weight.detach().clone()  # of `second` at the weights that it was built with
    first.square().sum().backward()
    x.grad, before = None, weight._version
    optimizer.step()
    turned = weight._version - before
    try:
        second.sum().backward()
    except RuntimeError as error:
        assert "inplace operation" in str(error)
        print(f"{name:9} counter +{turned}  backward after step: RuntimeError")
        return turned, None
    gap = float((x.grad - right).abs().max())
    assert torch.allclose(x.grad, torch.ones_like(second) @ weight.detach())
    print(f"{name:9} counter +{turned}  backward after step: the gradient of the new weights, off by {gap:.2g}")
    return turned, gap


for name, form in (("default", {}), ("foreach", {"foreach": True})):
    turned, gap = attempt(name, **form)
    assert turned > 0 and gap is None
turned, gap = attempt("fused", fused=True)
assert turned == 0 and gap > 0.1
others = {}
for kind in (torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):
    weight = nn.Parameter(torch.randn(3))
    optimizer = kind([weight], lr=0.1, fused=True)
    weight.grad, before, old = torch.ones(3), weight._version, weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, old)
    others[kind.__name__] = weight._version - before
print("fused " + ", ".join(f"{name} +{turned}" for name, turned in others.items()))
assert not any(others.values())
print("as described")
PY
"$work/venv/bin/python" "$work/try.py"

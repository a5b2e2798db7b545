"""One small training loop for every asset: seeded per step, resumable, cosine to zero."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from tiltflow.training.optim import cosine


def autocast() -> torch.autocast:
    """bf16 where this CPU multiplies it natively; elsewhere it is slower than fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def tensor_images(images) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def fit(
    name: str,
    modules: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    loss: Callable[[torch.Generator, int], torch.Tensor],
    steps: int,
    directory: Path,
    seed: int,
    after: Callable[[int], None] = lambda step: None,
    every: int = 100,
) -> None:
    """Trains `modules` for `steps`; `loss(generator, step)` is one batch's scalar loss."""
    path = directory / f"{name}.pt"
    rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
    params = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        start = state["step"]
        for key, module in modules.items():
            module.load_state_dict(state[key])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    began, total = time.time(), 0.0
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for optimizer, base in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * cosine(step, steps, warmup=100)
        value = loss(generator, step)
        if not torch.isfinite(value):
            raise RuntimeError(f"{name}: non-finite loss at step {step}")
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        after(step)
        total += value.item()
        if (step + 1) % every == 0 or step + 1 == steps:
            rate = (step + 1 - start) / (time.time() - began)
            print(f"{name} {step + 1}/{steps} loss {total / every:.4f} {rate:.2f}/s", flush=True)
            total = 0.0
            state = {key: module.state_dict() for key, module in modules.items()}
            state |= {"step": step + 1, "optimizers": [o.state_dict() for o in optimizers]}
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)


def batches(n: int, size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(n, (size,), generator=generator)


def chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))

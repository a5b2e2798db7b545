"""What both stages of the authors' code are given where it is driven beside ours."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from support.random_model import RandomModel
from tiltflow.config.load import RunConfig
from tiltflow.models.pipelines.storage import input_dtype


@dataclass(frozen=True)
class Bench:
    model: RandomModel
    batch: int
    side: int

    def settings(self, *more: str) -> list[str]:
        sizes = [f"train.batch_size={self.batch}", f"train.micro_batch_size={self.batch}"]
        return [*sizes, f"model.resolution={self.side}", *more]

    def clock(self) -> float:
        if self.model.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def parts(bench: Bench, cfg: RunConfig) -> dict[str, Any]:
    """What their loader returns: ours, with a stand-in for the autoencoder, which has no work."""
    backbone = bench.model.backbone(cfg)
    vae = SimpleNamespace(config=backbone.vae.config)
    vae.requires_grad_ = vae.eval = vae.to = lambda *_: vae
    return {
        "transformer": copy.deepcopy(backbone.transformer),
        "vae": vae,
        "text_encoders": [],
        "tokenizers": [],
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def prompts(bench: Bench, cfg: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Random embeddings of the batch's prompts and of the empty one, on the device."""
    random = torch.Generator().manual_seed(2)
    shapes = bench.model.shapes(cfg).conditioning_shapes()
    made = [
        torch.randn(bench.batch + 1, *shapes[key], generator=random).to(bench.model.device)
        for key in ("prompt_embeds", "pooled_prompt_embeds")
    ]
    dtype = input_dtype(bench.model.backbone(cfg).teacher_base)
    return made[0].to(dtype), made[1].to(dtype)


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Their code names its device: on a CPU, what it sends to a GPU stays where it is."""
    if device.type == "cuda":
        yield
        return
    with (
        patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        patch.object(torch.cuda, "synchronize", lambda *_: None),
    ):
        yield

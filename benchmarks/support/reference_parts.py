"""What both stages of the authors' code are given where it is driven beside ours."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from support.random_model import RandomModel
from tiltflow.config.load import RunConfig
from tiltflow.models.pipelines.storage import input_dtype

PUBLISHED = {
    "sd35m": ("sd35m.yaml", "load_sd35_models"),
    "klein": ("flux2_4b.yaml", "load_flux2_klein_models"),
}
"""A model's settings in their repository, and what there loads its weights."""
REPOSITORY = "Harahan/RTDMD"


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
        "scheduler": backbone.scheduler,
    }


def find_theirs(folder: Path) -> None:
    """Has their modules imported from `folder`.

    Raises:
        SystemExit: with a sentence, if it is not their repository or their code cannot be imported.
    """
    for needed in ("rtdmd/trainers/rtdmd_trainer.py", "configs/cold_start", "configs/rtdmd"):
        if not (folder / needed).exists():
            sys.exit(f"{folder} is not a checkout of {REPOSITORY}: there is no {needed} in it")
    sys.path.insert(0, str(folder.resolve()))
    try:
        import_module("rtdmd.trainers")
    except ModuleNotFoundError as error:
        sys.exit(f"the authors' code in {folder} needs a package that is not here: {error.name}")


def their_config(bench: Bench, folder: Path, stage: str, **overrides: Any) -> Any:
    """Their published settings of a stage at our sizes: nothing is loaded, logged or evaluated.

    A double underscore in a name is a dot."""
    values = {
        "model__image_resolution": bench.side,
        "model__generator_init_path": "",
        "model__fake_score_init_path": "",
        "model__teacher_init_path": "",
        "logging__enabled": False,
        "eval__enabled": False,
    }
    every = {name.replace("__", "."): value for name, value in (values | overrides).items()}
    path = folder / "configs" / stage / PUBLISHED[bench.model.name][0]
    return import_module("rtdmd.config").RTDMDConfig.from_yaml(str(path), overrides=every)


def cold_start_of_theirs(bench: Bench, folder: Path, cfg: RunConfig, **overrides: Any) -> Any:
    """Their trainer of stage 1, ready to run, with the networks of our `cfg`."""
    trainers = import_module("rtdmd.trainers")
    theirs = their_config(bench, folder, "cold_start", train__batch_size=bench.batch, **overrides)
    trainer, loaded = trainers.ACDMDTrainer(theirs), parts(bench, cfg)
    loader = PUBLISHED[bench.model.name][1]
    with on_device(bench.model.device), ExitStack() as stack:
        stack.enter_context(patch.object(trainers.dmd_trainer, loader, lambda _: loaded))
        stack.enter_context(patch.object(type(trainer), "_wrap_models", lambda *_: None))
        trainer.setup_models()
        trainer.setup_optimizers()
    return trainer


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


class HostTorch:
    """torch as a module sees it whose device is the CPU whatever it names."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: object) -> torch.device:
        return torch.device("cpu")

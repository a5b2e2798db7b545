"""Both stages of the demo's recipes, ready to run, on the embedded model or a wider random one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.distributed import ALONE, Ranks
from tiltflow.core.paths import resolve_path
from tiltflow.formats.writing import save_adapter
from tiltflow.models.roles import adapter_roles
from tiltflow.setup.build import Build, adapter_settings, build_backbone, build_stage

STAGES = ("cold_start", "tilt")


@dataclass(frozen=True)
class Model:
    """A pipeline's directory, and a random stage-1 adapter for stage 2 to start from."""

    path: str
    few_step: Path

    def config(self, stage: str, *more: str) -> RunConfig:
        """The demo's recipe; prompts are encoded anew, and nothing is watched."""
        values = [f"model.path={self.path}", "data.cache=off", "watch.rewards={}", "run.device=cpu"]
        if stage == "tilt":
            values.append(f"model.few_step={self.few_step}")
        return load_config(f"demo_{stage}", [*values, "run.out=unused", *more])

    def build(self, stage: str, *more: str, ranks: Ranks = ALONE) -> Build:
        build = build_stage(self.config(stage, *more), ranks=ranks)
        build.backbone.free_text_encoders()
        return build


@contextmanager
def model(width: int = 1) -> Iterator[Model]:
    """The embedded model, its transformer `width` times as wide (then with random weights)."""
    with tempfile.TemporaryDirectory() as folder:
        path = "packaged:pipeline"
        if width > 1:
            path = str(_wider(Path(folder) / "pipeline", width))
        made = Model(path, Path(folder) / "few_step")
        _random_adapter(made)
        yield made


def _wider(folder: Path, width: int) -> Path:
    shutil.copytree(resolve_path("packaged:pipeline"), folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    for key in ("num_attention_heads", "caption_projection_dim"):
        config[key] *= width
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(0)
    SD3Transformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    return folder


def _random_adapter(made: Model) -> None:
    cfg = made.config("cold_start")
    backbone = build_backbone(cfg, "image")
    settings = adapter_settings(cfg, backbone)
    weights = adapter_roles(backbone, settings, seed=0).generator.state()
    random = torch.Generator().manual_seed(1)
    for name, value in weights.items():
        if ".lora_B." in name:
            value.copy_(0.01 * torch.randn(value.shape, generator=random))
    save_adapter(StableDiffusion3Pipeline, weights, settings, made.few_step)

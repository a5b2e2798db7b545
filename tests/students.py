"""Random students of tiny pipelines, exported as a run exports its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.checkpoint import Checkpoint
from tiltflow.data.prompts import Prompt
from tiltflow.formats.wanted import Wanted
from tiltflow.models.families import load_backbone
from tiltflow.models.roles import AdapterSettings, adapter_roles
from tiltflow.tasks.evaluate import Request, prepare
from tiltflow.tasks.export import export_checkpoint

RESOLUTION, TOKENS = 64, 24
MERGED = ("diffusers", "merged")
PROMPTS = ["a red cat", "two dogs"]
MODELS = {
    "sd3m": ("sd3m", None),
    "sd35m": ("sd35m", None),
    "sd35l": ("sd35l", None),
    "flux1_dev": ("flux_dev", None),
    "schnell": ("flux_schnell", None),
    "flux2_klein_4b": ("klein_base", "klein"),
    "z_image": ("z_image", "z_image_turbo"),
    "chroma": ("chroma", None),
    "sana": ("sana", None),
    "qwen_image": ("qwen_image", None),
    "qwen_image_21": ("qwen_image_21", None),
    "krea2": ("krea2", "krea2_turbo"),
    "flux2_dev": ("flux2_dev", None),
    "wan21_1b": ("wan", None),
    "other_sizes": ("other_sd3_patch_4", None),
}
"""A recipe's model (or one that has none), its tiny pipeline and its generator's."""


@dataclass(frozen=True)
class Student:
    """A pipeline directory, its generator's (klein), and the folder of the export."""

    model: Path
    generator: Path | None
    export: Path
    config: RunConfig
    checkpoint: Checkpoint

    @property
    def base(self) -> Path:
        return self.generator or self.model


def student(tiny: Callable[[str], Path], name: str, out: Path, **options: Any) -> Student:
    """A stage-2 student with random adapters, exported to `out`/export: `options` are of `Wanted`,
    `evaluation`, `settings`, those of stage 1's and stage 2's adapter, `tokens` and `size`."""
    base, generator = MODELS[name]
    tokens, size = options.pop("tokens", TOKENS), options.pop("size", RESOLUTION)
    folders = [shutil.copytree(tiny(n), out / n) for n in (base, generator) if n is not None]
    for folder in folders:
        (folder / "tiltflow.json").write_text(json.dumps({"max_sequence_length": tokens}))
    model, second = folders[0], folders[1] if generator else None
    loading: dict[str, Any] = {"generator_path": second, "resolution": size}
    backbone = load_backbone(model, device="cpu", **loading)
    alike = AdapterSettings(2, 4.0, backbone.lora_targets())
    below, above = options.pop("settings", (alike, alike))
    shapes = [adapter_roles(backbone, below, seed=0).generator.state()] * 2
    if above is not below:
        fresh = load_backbone(model, device="cpu", **loading)
        shapes[1] = adapter_roles(fresh, above, seed=0).generator.state()
    tensors = {group: random_like(shapes[i], i) for i, group in enumerate(("few_step", "ema"))}
    facts = {"stage": "tilt", "adapters": vars(above), "few_step_adapters": vars(below)}
    checkpoint = Checkpoint(3, tensors, facts)
    recipe = "sd35m_tilt" if name in ("schnell", "other_sizes") else f"{name}_tilt"
    config = load_config(
        recipe,
        [
            f"model.path={model}",
            f"model.generator_path={second or 'null'}",
            f"model.family={backbone.family}",
            f"model.resolution={list(size) if isinstance(size, tuple) else size}",
            f"model.max_sequence_length={tokens}",
            "model.dtype=fp32",
            f"data.prompts={out / 'prompts.txt'}",
        ],
    )
    evaluation = options.pop("evaluation", None)
    export_checkpoint(config, checkpoint, out / "export", Wanted(**options), evaluation)
    return Student(model, second, out / "export", config, checkpoint)


def pictures(called: Any) -> Tensor:
    """(B, C, H, W) of what a pipeline's call with `output_type="pt"` gives: of videos the first
    frames."""
    made: Tensor = called.frames[:, 0] if "frames" in called else called.images
    return made


def random_like(shapes: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in shapes.items()}


def request(made: Student, **options: Any) -> Request:
    values: dict[str, Any] = {
        "model": str(made.model),
        "generator_path": str(made.generator) if made.generator else None,
        "prompts": [Prompt(text, {}) for text in PROMPTS],
        "few_step": made.export / "few_step",
        "tilt_lora": made.export / "tilt",
        "resolution": RESOLUTION,
        "device": "cpu",
    }
    return Request(**values | options)


def sampled(asked: Request) -> Tensor:
    """What `tiltflow sample` makes before it rounds to eight bits: (B, 3, H, W)."""
    loaded, sampler = prepare(asked)
    return sampler.systems(loaded, teacher=False)[-1].sample(list(range(len(asked.prompts))))

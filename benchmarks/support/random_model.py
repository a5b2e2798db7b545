"""A published model at its real geometry with random weights, made where it runs, and its stages.

Nothing is downloaded or written: the networks' shapes are those of `backbones.published`, their
weights are drawn on the device, and prompts have random embeddings of the real sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tiltflow.config.load import RunConfig, load_config
from tiltflow.data.embeddings import EncodedPrompts
from tiltflow.data.prompts import Prompt, load_prompts
from tiltflow.formats.writing import save_adapter
from tiltflow.models.backbone import Conditioning, Loading
from tiltflow.models.family import family_named
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.directory import Pipeline
from tiltflow.models.pipelines.meta import META, meta_backbone, meta_pipeline, pipeline_configs
from tiltflow.models.pipelines.products import take_onednn
from tiltflow.models.roles import adapter_roles
from tiltflow.setup import build as building
from tiltflow.setup.build import DTYPES, Build, adapter_settings, build_stage
from tiltflow.setup.planner import Plan
from tiltflow.tasks.planning import device_bytes, fastest, is_auto, sized, with_graphs
from tiltflow.tasks.plans import plan_recipe

MODELS = {
    "sd35m": ("stabilityai/stable-diffusion-3.5-medium", "sd35m", 128, "sd3"),
    "klein": ("black-forest-labs/FLUX.2-klein-base-4B", "flux2_klein_4b", 128, "flux2"),
}
"""A model's id, its recipes, how many text tokens its long encoder gives, and its backbone."""
TOY = {
    "SD3Transformer2DModel": {
        "num_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 8,
        "caption_projection_dim": 256,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "dual_attention_layers": [0, 1],
    },
    "Flux2Transformer2DModel": {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 8,
        "joint_attention_dim": 64,
        "axes_dims_rope": [8, 8, 8, 8],
    },
    "AutoencoderKL": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
    "AutoencoderKLFlux2": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
}
"""What `toy=True` makes smaller, by a part's class."""
PROMPTS = 64


def texts() -> list[str]:
    """The prompts: words that the embedded CLIP knows, which refuses others."""
    return list(dict.fromkeys(p.text for p in load_prompts("shapes-train")))[:PROMPTS]


def brightness(images: Tensor, prompts: Sequence[str], metadata: object) -> Tensor:
    """A reward that costs nothing: how bright an image is."""
    return images.mean((1, 2, 3))


brightness.differentiable = True  # type: ignore[attr-defined]


@dataclass
class RandomModel:
    """A pipeline's networks as random tensors on a device; every build has roles of its own."""

    name: str
    device: torch.device
    toy: bool
    folder: Path
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    plans: dict[tuple[Any, ...], Plan] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"random/{self.name}" if self.toy else MODELS[self.name][0]

    def config(self, stage: str, *more: str) -> RunConfig:
        """The published recipe with one micro-batch, and nothing around the iterations."""
        _, recipe, tokens, _ = MODELS[self.name]
        values = [
            f"model.path={self.path}",
            f"data.prompts={self.folder / 'prompts.txt'}",
            "data.cache=off",
            f"run.device={self.device}",
            f"run.out={self.folder / 'run'}",
            f"model.max_sequence_length={8 if self.toy else tokens}",
        ]
        if self.name == "klein":
            values.append("model.generator_path=null")
        if self.toy:
            values.append("model.resolution=64")
        if stage == "tilt":
            values += [
                f"model.few_step={self.folder / 'few_step'}",
                "rewards={'support.random_model:brightness': 1.0}",
            ]
        cfg = load_config(f"{recipe}_{stage}", [*values, *more])
        if not is_auto(cfg):
            return cfg
        memory = device_bytes(self.device)
        cfg = sized(cfg, memory, cfg.train.batch_size, self.planned)
        parts, plan = fastest(cfg, memory, self.planned)
        return with_graphs(cfg, parts, plan, memory, self.planned)[0]

    def planned(self, cfg: RunConfig) -> Plan:
        """The plan of a config, made once for each that holds anything else in memory."""
        model, train = cfg.model, cfg.train
        sizes = (model.resolution, train.batch_size, train.micro)
        keeps = cfg.stage == "tilt" and cfg.tilt.keep_graph
        key = (cfg.stage, model.dtype, model.checkpointed, *sizes, keeps)
        if key not in self.plans:
            self.plans[key] = plan_recipe(cfg)
        return self.plans[key]

    def build(self, stage: str, *more: str) -> Build:
        """A stage ready to run, through `build_stage`."""
        cfg = self.config(stage, *more)
        backbone = self.backbone(cfg)
        backbone.fuse()
        take_onednn(backbone.transformer)
        if "decoder" in cfg.model.checkpointed:
            backbone.checkpoint_decoder()
        if stage == "tilt":
            self._few_step(cfg)
        prompts = [Prompt(text) for text in texts()]
        encoded = self._encoded(backbone, prompts)
        with (
            patch.object(building, "build_backbone", lambda *_: backbone),
            patch.object(building, "encode_sets", lambda *_: [encoded]),
        ):
            return build_stage(cfg)

    def backbone(self, cfg: RunConfig) -> PipelineBackbone:
        """The family's backbone on the random weights, which all builds share."""
        dtype = DTYPES[cfg.model.dtype]
        pipe = meta_pipeline(pipeline_configs(self.path), dtype, dtype)
        for part in ("transformer", "vae"):
            network = getattr(pipe, part)
            if part not in self.weights:
                self.weights[part] = _draw(network, self.device, seed=len(self.weights))
            network.load_state_dict(self.weights[part], assign=True)
        family = family_named(MODELS[self.name][3])
        loading = Loading(
            self.device,
            dtype,
            resolution=cfg.model.resolution,
            max_sequence_length=cfg.model.max_sequence_length,
        )
        made: PipelineBackbone = family.backbone_class()(
            family, Pipeline(self.path), loading, pipe=pipe
        )
        return made

    def shapes(self, cfg: RunConfig) -> PipelineBackbone:
        """The same model on the meta device."""
        return meta_backbone(
            self.path,
            dtype=DTYPES[cfg.model.dtype],
            resolution=cfg.model.resolution,
            max_sequence_length=cfg.model.max_sequence_length,
        )

    def _encoded(self, backbone: PipelineBackbone, prompts: list[Prompt]) -> EncodedPrompts:
        random = torch.Generator().manual_seed(2)
        dtype = backbone.input_dtype(backbone.teacher_base)

        def table(rows: int) -> dict[str, Tensor]:
            return {
                key: torch.randn(rows, *shape, generator=random).to(dtype)
                for key, shape in backbone.conditioning_shapes().items()
            }

        cond = Conditioning(table(len(prompts)), table(1))
        return EncodedPrompts(tuple(prompts), (cond,), tuple((0, i) for i in range(len(prompts))))

    def _few_step(self, cfg: RunConfig) -> None:
        """A random stage-1 adapter in a folder, for stage 2."""
        folder = self.folder / "few_step"
        if folder.exists():
            return
        backbone = self.shapes(cfg)
        settings = adapter_settings(cfg, backbone)
        with META:
            state = adapter_roles(backbone, settings, seed=0).generator.state()
        random = torch.Generator().manual_seed(1)
        drawn = {k: 0.01 * torch.randn(v.shape, generator=random) for k, v in state.items()}
        save_adapter(type(backbone.pipe), drawn, settings, folder)


def _draw(network: nn.Module, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random tensors for a network's state: matrices of unit gain or less, norms at 1."""
    random = torch.Generator(device).manual_seed(seed)
    drawn = {}
    for name, value in network.state_dict().items():
        made = torch.empty(value.shape, dtype=value.dtype, device=device)
        if value.ndim > 1:
            fan_in = value[0].numel()
            made.normal_(std=min(0.02, 1 / math.sqrt(fan_in)), generator=random)
        elif not value.is_floating_point():
            made.zero_()
        else:
            made.fill_(0.0 if name.endswith(("bias", "mean")) else 1.0)
        drawn[name] = made
    return drawn


@contextmanager
def random_model(name: str, device: torch.device, toy: bool, folder: Path) -> Iterator[RandomModel]:
    """`MODELS[name]`, or a small one of its kind, with its files in `folder`."""
    made = RandomModel(name, device, toy, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("".join(f"{text}\n" for text in texts()))
    if not toy:
        yield made
        return
    hub_id, family = MODELS[name][0], family_named(MODELS[name][3])
    published = family.published[hub_id]
    small = {
        part: {**config, **TOY.get(config.get("_class_name", ""), {})}
        if isinstance(config, dict)
        else config
        for part, config in published.configs.items()
    }
    with patch.dict(family.published, {made.path: replace(published, configs=small)}):
        yield made

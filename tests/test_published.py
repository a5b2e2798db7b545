"""The recipes against the published architectures and METHOD §6, on the meta device."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltflow.config.load import RunConfig, list_recipes, load_config
from tiltflow.models.family import published
from tiltflow.models.pipelines.meta import META, meta_backbone, pipeline_configs, text_encoders
from tiltflow.models.roles import AdapterSettings, adapter_roles

DOCS = Path(__file__).parents[1] / "docs" / "backbones.md"
STREAMS = 8
"""Projections of a double block: query, key, value and output of image and text."""

# model: blocks (double, single), heads, transformer's parameters in 10⁹ to the second digit,
# adapted modules, trainable parameters of one adapter of rank 32, by hand:
# 32 · (inputs + outputs) of each adapted matrix.
SD3 = (24 * STREAMS - 1, (24 * STREAMS - 1) * 32 * (1536 + 1536))
SD3_LARGE = (38 * STREAMS - 1, (38 * STREAMS - 1) * 32 * (2432 + 2432))
FLUX = (19 * STREAMS + 38 * 3, (19 * STREAMS + 38 * 3) * 32 * (3072 + 3072))
KLEIN_4B = (
    5 * STREAMS + 20 * 2,
    32 * (5 * STREAMS * 2 * 3072 + 20 * ((1 + 3 + 2 * 3) * 3072 + (1 + 3 + 1) * 3072)),
)
KLEIN_9B = (
    8 * STREAMS + 24 * 2,
    32 * (8 * STREAMS * 2 * 4096 + 24 * ((1 + 3 + 2 * 3) * 4096 + (1 + 3 + 1) * 4096)),
)
EXPECTED: dict[str, tuple[tuple[int, int], int, float, tuple[int, int]]] = {
    "sd3m": ((24, 0), 24, 2.03, SD3),
    "sd35m": ((24, 0), 24, 2.24, SD3),
    "sd35l": ((38, 0), 38, 8.06, SD3_LARGE),
    "flux1_dev": ((19, 38), 24, 11.90, FLUX),
    "flux2_klein_4b": ((5, 20), 24, 3.88, KLEIN_4B),
    "flux2_klein_9b": ((8, 24), 32, 9.08, KLEIN_9B),
}


@cache
def recipe(name: str) -> RunConfig:
    more = ["data.prompts=prompts.txt"]
    return load_config(name, more)


def architecture(name: str) -> tuple[Any, AdapterSettings, dict[str, torch.Tensor]]:
    """The student's backbone on meta, the recipe's adapter, and its parameters."""
    cfg = recipe(f"{name}_tilt")
    backbone = meta_backbone(
        cfg.model.path, generator_path=cfg.model.generator_path, resolution=cfg.model.resolution
    )
    targets = cfg.adapters.targets or backbone.lora_targets()
    settings = AdapterSettings(cfg.adapters.rank, cfg.adapters.alpha, targets)  # type: ignore[arg-type]
    with META:
        roles = adapter_roles(backbone, settings, seed=0)
    return backbone, settings, roles.generator.state()


@pytest.mark.parametrize("name", EXPECTED)
def test_targets_match_the_published_modules(name: str) -> None:
    (double, single), heads, billions, (modules, trainable) = EXPECTED[name]
    backbone, _, state = architecture(name)
    network = backbone.student_base
    assert all(t.is_meta for t in state.values())
    names = {n for n, _ in network.named_modules()}
    assert f"transformer_blocks.{double - 1}" in names
    assert f"transformer_blocks.{double}" not in names
    assert (f"single_transformer_blocks.{single - 1}" in names) == (single > 0)
    assert f"single_transformer_blocks.{single}" not in names
    assert network.config.num_attention_heads == heads
    own = {id(p) for p in state.values()}
    total = sum(p.numel() for n, p in network.named_parameters() if ".lora_" not in n)
    assert total / 1e9 == pytest.approx(billions, abs=0.006)
    found = {n.split(".lora_A")[0] for n in state if ".lora_A" in n}
    assert len(found) == modules and len(own) == 2 * modules
    assert sum(t.numel() for t in state.values()) == trainable
    row = f"| {name} | {double} + {single} | {total:,} | {modules} | {trainable:,} |"
    assert row in DOCS.read_text(), row


def test_sd35_has_dual_attention_in_its_first_13_blocks_and_adapts_it_nowhere() -> None:
    backbone, _, state = architecture("sd35m")
    names = {n for n, _ in backbone.student_base.named_modules()}
    dual = [i for i in range(24) if f"transformer_blocks.{i}.attn2.to_q" in names]
    assert dual == list(range(13))
    assert not any("attn2" in name for name in state)
    plain, _, _ = architecture("sd3m")
    assert not any(".attn2" in n for n, _ in plain.student_base.named_modules())


def test_every_recipe_names_a_published_pipeline() -> None:
    for name in EXPECTED:
        for stage in ("cold_start", "tilt"):
            model = recipe(f"{name}_{stage}").model
            for path in (model.path, model.generator_path):
                assert path is None or published(path) is not None
    for name, distilled in (("klein-4B", True), ("klein-base-4B", False)):
        klein = published(f"black-forest-labs/FLUX.2-{name}")
        assert klein is not None and klein.configs["is_distilled"] == distilled


def test_text_encoders_have_their_published_sizes() -> None:
    """In 10⁹: CLIP-L .12, CLIP-G .69, T5-XXL's encoder 4.76, Qwen3 4.02 and 8.19."""
    sizes = {
        "stabilityai/stable-diffusion-3.5-medium": [0.12, 0.69, 4.76],
        "black-forest-labs/FLUX.1-dev": [0.12, 4.76],
        "black-forest-labs/FLUX.2-klein-base-4B": [4.02],
        "black-forest-labs/FLUX.2-klein-9B": [8.19],
    }
    for path, billions in sizes.items():
        found = [sum(p.numel() for p in e.parameters()) / 1e9 for e in text_encoders(path).values()]
        assert found == pytest.approx(billions, abs=0.006)
        width = pipeline_configs(path)["transformer"]["joint_attention_dim"]
        assert width in (4096, 7680, 12288)


# METHOD §6: resolution, stage-1 rate, guidance, stage-2 batch, group, stage-2 φ rate, consistency
METHOD = {
    "sd3m": (1024, 3e-5, 7.0, 512, 16, 3e-5, True),
    "sd35m": (512, 3e-5, 4.5, 1152, 24, 3e-5, True),
    "flux1_dev": (512, 3e-5, 3.5, 1536, 24, 1e-6, False),
    "flux2_klein_4b": (512, 1e-6, 4.0, 1536, 24, 1e-6, True),
    "flux2_klein_9b": (512, 1e-6, 4.0, 1536, 24, 1e-6, False),
}


@pytest.mark.parametrize("name", METHOD)
@pytest.mark.parametrize("variant", ["", "_24gb", "_40gb"])
def test_hyper_parameters_are_the_published_ones(name: str, variant: str) -> None:
    resolution, rate, guidance, batch, group, fake_rate, consistency = METHOD[name]
    first, second = f"{name}_cold_start{variant}", f"{name}_tilt{variant}"
    if not {first, second} & set(list_recipes()):
        pytest.skip("there is no recipe of this size")
    cold = recipe(first if first in list_recipes() else f"{name}_cold_start")
    tilt = recipe(second if second in list_recipes() else f"{name}_tilt")
    for cfg in (cold, tilt):
        assert (cfg.model.resolution, cfg.model.guidance) == (resolution, guidance)
        assert (cfg.adapters.rank, cfg.adapters.alpha, cfg.adapters.kind) == (32, 64.0, "lora")
        assert cfg.adapters.targets is None
        assert (cfg.train.betas, cfg.train.clip) == ((0.9, 0.999), 1.0)
        assert (cfg.sampler.steps, cfg.sampler.eta) == (4, 0.9)
        assert cfg.model.dtype == "bf16" and cfg.model.gradient_checkpointing in (True, "auto")
        assert (cfg.train.schedule, cfg.train.warmup) == ("constant", 0)
    train = cold.train
    assert (train.steps, train.batch_size, train.ema, train.weight_decay) == (15000, 72, 0.99, 0)
    assert train.generator_lr == train.fake_score_lr == rate
    assert (cold.cold_start.generator_every, cold.cold_start.consistency) == (10, 0.01)
    train = tilt.train
    assert (train.steps, train.batch_size, train.ema, train.weight_decay) == (
        1000,
        batch,
        0.9,
        1e-4,
    )
    assert (train.generator_lr, train.fake_score_lr) == (3e-6, fake_rate)
    chosen = tilt.tilt
    assert (chosen.group_size, chosen.subset, chosen.clip_range) == (group, 2, 1e-5)
    assert (chosen.matching_weight, chosen.reward_weight, chosen.kl) == (1e-3, 1e-4, 0.0)
    assert chosen.consistency == (0.01 if consistency else 0.0)


@pytest.mark.parametrize("recipe_name", [n for n in list_recipes() if n.endswith("gb")])
def test_variants_for_one_gpu_differ_in_memory_only(recipe_name: str) -> None:
    parent, _, size = recipe_name.rpartition("_")
    small, large = recipe(recipe_name).model_dump(), recipe(parent).model_dump()
    different = {
        f"{section}.{key}"
        for section, values in small.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != large[section][key]
    }
    assert different <= {
        "train.micro_batch_size", "tilt.decode_chunk", "model.base_storage", "model.few_step",
        "run.out", "watch.rewards",  # reward models take memory of their own
    }  # fmt: skip
    text = (Path(__file__).parents[1] / "src/tiltflow/recipes" / f"{recipe_name}.yaml").read_text()
    assert f"with {size.removesuffix('gb')} GB" in text and "time" in text.split("stage:")[0]

"""A family from outside the package, `examples/own_family.py`, from its directory to an export."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
)
from rich.console import Console
from tiny_pipelines import t5
from transformers import UMT5Config, UMT5EncoderModel

from tiltflow.config.load import load_config
from tiltflow.data.prompts import Prompt
from tiltflow.flow import euler_step
from tiltflow.models.families import check_pipeline, load_backbone
from tiltflow.tasks.evaluate import prepare
from tiltflow.tasks.request import Request
from tiltflow.tasks.train import run_training

EXAMPLES = Path(__file__).parents[1] / "examples"
NAME = "own_family:FAMILY"
PROMPTS = ["a red cat", "two dogs and a story"]


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield
        sys.modules.pop("own_family", None)


@pytest.fixture(scope="module")
def aura(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aura")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, tokenizer = t5(32)
        config = UMT5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.13025,
        )
        transformer = AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=64,
            pos_embed_max_size=256,
        )
        transformer.register_tokens.data.normal_()
        AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(config),
            vae=vae,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        ).save_pretrained(path)
    return path


def test_it_is_one_short_file_and_unknown_by_itself(aura: Path) -> None:
    assert len((EXAMPLES / "own_family.py").read_text().splitlines()) <= 150
    with pytest.raises(
        ValueError, match="a AuraFlowPipeline, .*Krea2Pipeline, WanPipeline; a family can be"
    ):
        check_pipeline(aura)
    with pytest.raises(ValueError, match="'own_family' has no 'WRONG'"):
        check_pipeline(aura, "own_family:WRONG")
    assert check_pipeline(aura, NAME) == "aura_flow"


@torch.no_grad()
@pytest.mark.parametrize(("batch", "guidance"), [(2, 1.0), (1, 3.0)])
def test_images_are_the_pipelines_to_the_last_bit(aura: Path, batch: int, guidance: float) -> None:
    prompts = PROMPTS[-batch:]
    options: dict[str, Any] = {"resolution": 64, "max_sequence_length": 16}
    backbone: Any = load_backbone(aura, family=NAME, device="cpu", **options)
    x = torch.randn(batch, *backbone.latent_shape, generator=torch.Generator().manual_seed(3))
    pipe = AuraFlowPipeline.from_pretrained(aura)
    theirs = pipe(
        prompts,
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=guidance,
        max_sequence_length=16,
        latents=x.clone(),
        output_type="pt",
    ).images
    cond = backbone.encode(prompts)
    for now, then in pairwise(backbone.teacher_sigmas(3)):
        level = now.expand(batch)
        v = backbone.velocity(backbone.teacher_base, x, level, cond, guidance)
        x = euler_step(x, v, level, then.expand(batch))
    assert theirs.std() > 0.03 and (backbone.decode(x) - theirs).abs().max() == 0


def test_it_trains_samples_and_exports(aura: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run = run_training(
        load_config(
            "demo_cold_start",
            [
                f"model.path={aura}", f"model.family={NAME}", "model.resolution=64",
                "model.max_sequence_length=16", "model.dtype=fp32", "run.device=cpu",
                f"run.out={tmp_path / 'run'}", f"data.prompts={tmp_path / 'prompts.txt'}",
                "train.steps=2", "train.batch_size=2", "train.micro_batch_size=2",
                "cold_start.generator_every=1", "adapters.rank=2", "log.samples_every=0",
                "watch.rewards={}", "train.generator_lr=0.1", "adapters.targets=null",
            ],
        ),
        Console(quiet=True),
    )  # fmt: skip
    asked = Request(
        str(aura), [Prompt(text, {}) for text in PROMPTS], run / "export" / "few_step",
        family=NAME, device="cpu", seed=7,
    )  # fmt: skip
    loaded, sampler = prepare(asked)
    ours = sampler.systems(loaded, teacher=False)[-1].sample([0, 1])
    pipe: Any = AuraFlowPipeline.from_pretrained(aura)
    pipe.load_lora_weights(run / "export" / "few_step", adapter_name="few_step")
    from tiltflow.scheduler import CPSFlowMatchScheduler

    pipe.scheduler = CPSFlowMatchScheduler.from_pretrained(run / "export" / "scheduler")
    theirs = pipe(
        PROMPTS,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=pipe.scheduler.seed(7, images=2),
        output_type="pt",
    ).images
    assert ours.std() > 0.03 and (ours - theirs).abs().max() == 0

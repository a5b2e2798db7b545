"""Puts the trained parts into the package, in diffusers and transformers directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from transformers import CLIPModel, CLIPTokenizer

from assets import clip as clips
from assets.data import render_pool
from assets.teacher import build_pipeline, evaluate
from assets.vae import reconstruction_error

GUIDANCE = 4.0
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 64},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 64, "width": 64},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(clips.MEAN),
    "image_std": list(clips.STD),
    "do_convert_rgb": True,
}


def package(work: Path, out: Path, prompts: int = 516) -> None:
    """Writes `out`/pipeline, `out`/clip, `out`/clip_heldout and figures.json."""
    transformer = SD3Transformer2DModel.from_pretrained(work / "teacher")
    pipe = build_pipeline(work, transformer)
    figures: dict[str, object] = {"vae_mse": _vae_error(pipe.vae, work)}
    for name in clips.REWARDS:
        model = CLIPModel.from_pretrained(work / name).eval()
        tokenizer = CLIPTokenizer.from_pretrained(work / name)
        figures[f"{name}_hard_accuracy"] = round(clips.hard_accuracy(model, tokenizer), 4)
        directory = out / name
        shutil.rmtree(directory, ignore_errors=True)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
    for guidance in (1.0, 2.0, 3.0, 4.0, 6.0):
        figures[f"teacher_50_steps_guidance_{guidance:g}"] = evaluate(
            pipe, transformer, n=prompts, steps=50, guidance=guidance
        )
        print(f"guidance {guidance:g}: {figures[f'teacher_50_steps_guidance_{guidance:g}']}")
    shutil.rmtree(out / "pipeline", ignore_errors=True)
    pipe.transformer = transformer.to(torch.float16)
    pipe.save_pretrained(out / "pipeline")
    side = {"max_sequence_length": 0, "guidance": GUIDANCE}
    (out / "pipeline" / "tiltflow.json").write_text(json.dumps(side, indent=1) + "\n")
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
    print(f"{out}: {size:.1f} MB")


def _vae_error(vae, work: Path) -> float:
    images, _ = render_pool(work, "valid", 1000, seed=2)
    return round(reconstruction_error(vae.eval(), images[:500]), 5)

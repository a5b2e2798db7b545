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
from assets.harden import pair_accuracy
from assets.teacher import FALSE, build_pipeline, evaluate
from assets.vae import reconstruction_error

GUIDANCE = 1.5  # the pipeline's default
KINDS = ("hard", "pair", "relation")
GUIDANCES = (1.0, 1.5, 2.0, 3.0)
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


def package(work: Path, out: Path, prompts: int = 258) -> None:
    """Writes `out`/pipeline, `out`/clip, `out`/clip_heldout and figures.json."""
    transformer = SD3Transformer2DModel.from_pretrained(work / "teacher")
    pipe = build_pipeline(work, transformer)
    figures: dict[str, object] = {"vae_mse": _vae_error(pipe.vae, work)}
    for name in clips.REWARDS:
        measured = package_clip(work / name, out / name)
        figures |= {f"{name}_{what}_accuracy": value for what, value in measured.items()}
    for guidance in GUIDANCES:
        figures[f"teacher_50_steps_guidance_{guidance:g}"] = evaluate(
            pipe, transformer, n=prompts, steps=50, guidance=guidance
        )
        print(f"guidance {guidance:g}: {figures[f'teacher_50_steps_guidance_{guidance:g}']}")
    shutil.rmtree(out / "pipeline", ignore_errors=True)
    pipe.transformer = transformer.to(torch.float16)
    pipe.save_pretrained(out / "pipeline")
    _forget_origin(out / "pipeline")
    side = {"max_sequence_length": 0, "guidance": GUIDANCE}
    (out / "pipeline" / "tiltflow.json").write_text(json.dumps(side, indent=1) + "\n")
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "README.md").write_text(card(figures))
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
    print(f"{out}: {size:.1f} MB")


def package_clip(source: Path, directory: Path) -> dict[str, float]:
    """One reward model with its preprocessing; its accuracy among near misses and the like."""
    model = CLIPModel.from_pretrained(source).eval()
    tokenizer = CLIPTokenizer.from_pretrained(source)
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
    tests = {
        "hard": clips.hard_accuracy,
        "pair": pair_accuracy,
        "relation": clips.relation_accuracy,
    }
    return {what: round(test(model, tokenizer), 4) for what, test in tests.items()}


def card(figures: dict) -> str:
    """The model card, with the measured figures."""
    rows = []
    for key, table in figures.items():
        if key.startswith("teacher"):
            cells = [key.rsplit("_", 1)[1], *(f"{v:.3f}" for v in table.values())]
            rows.append("| " + " | ".join(cells) + " |")
    head = list(figures[f"teacher_50_steps_guidance_{GUIDANCE:g}"])
    return CARD.format(
        head=" | ".join(["guidance", *head]),
        line="|".join(["---"] * (len(head) + 1)),
        rows="\n".join(rows),
        guidance=GUIDANCE,
        clip=_three(figures, "clip"),
        heldout=_three(figures, "clip_heldout"),
        vae=figures["vae_mse"],
        false=FALSE,
    )


def _forget_origin(pipeline: Path) -> None:
    """diffusers notes in a part's config where it was read: a directory of this machine."""
    for file in pipeline.glob("*/config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None):
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _three(figures: dict, name: str) -> str:
    return ", ".join(f"{figures[f'{name}_{what}_accuracy']:.3f}" for what in KINDS)


CARD = """# The embedded model

A text-to-image flow model of the world of shapes (`rewards.worlds.shapes`: four shapes, eight
colours, one to three objects on black or white, each in a quarter of the frame and blue unless the
caption gives it a colour; GenEval's six categories), small enough to train and distil on two CPU
cores, in the formats of the real ones. Made by `scripts/build_assets.py` on rendered images alone;
Apache-2.0 like the code. It knows nothing else.

| directory | what it is |
|---|---|
| `pipeline` | a diffusers `StableDiffusion3Pipeline` without a third text encoder, 64x64 pixels |
| `clip` | a `CLIPModel`, the trained reward `clipscore` |
| `clip_heldout` | a `CLIPModel` of other architecture and seed, `clipscore_heldout` |

    pipe = StableDiffusion3Pipeline.from_pretrained(DIR, text_encoder_3=None, tokenizer_3=None)
    pipe("two red circles", guidance_scale={guidance:g}, max_sequence_length=0)

The transformer has 7.8 M parameters (stored in fp16); the autoencoder 8 channels of 8x8.
`max_sequence_length=0` leaves out the zero tokens that the pipeline puts in the place of the absent
third encoder (256 by default: slower, and on 96 prompts .31 strict for .58). `tiltflow.json` holds
these defaults for tiltflow.

## How good they are

Teacher, 50 Euler steps, on held-out captions, by the exact checker (strict, soft, and strict by
category):

| {head} |
|{line}|
{rows}

Autoencoder: mean squared error {vae} on [-1, 1]. The reward models on held-out renders: how often
the right caption wins against three near misses (one shape, colour, count, relation or background
changed); the better of two images for a caption, blends of a right scene and one that differs in
one respect; and, of the four relations, the right one. `clip` {clip};
`clip_heldout` {heldout}.

## How they were made

By `scripts/build_assets.py`, in five sittings on two CPU cores. First, on a harder world (objects
anywhere, of any colour where the caption gave none; stars and groups of four in part of it): the
autoencoder, two CLIP models whose text towers the pipeline holds (their other halves are not
shipped), 3,200 steps of the transformer (Muon and AdamW, strict accuracy .23) and 1,800 of each
reward model. Then `--reuse`: 3,400 more steps of the transformer on today's world (AdamW 8e-4,
batch 128, with the second task of `PlaceHead`) and 1,300 and 650 of the reward models. In a third
sitting `clip` was hardened: 1,600 steps on images under attack, and 1,100 with pairs of images as
well. None of these knew relations ("left of"), which the fourth sitting taught
(`assets/harden.py`): all four CLIPs 500 steps of naming what is where, from the image and from the
caption, then `clip` 1,000 more under attack and `clip_heldout` 600 without; and the transformer 600
steps on the towers that came of it (AdamW 6e-4, the first quarter of a schedule of 2,400). In the
fifth the transformer went on for 1,200 steps (AdamW 6e-4) in which {false:.0%} of the images had a
caption that is wrong in one respect, as captions from the web are: docs/lab/demo_settings.md,
"Which teacher", has the reason. Without `--reuse` the script trains everything afresh on
today's world; that way has not been run to its end.
"""


def _vae_error(vae, work: Path) -> float:
    images, _ = render_pool(work, "valid")
    return round(reconstruction_error(vae.eval(), images[:500]), 5)

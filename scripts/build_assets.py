"""Builds the embedded default's weights: `python scripts/build_assets.py [--stage NAME]`.

Stages: pool, vae, encoder_a, encoder_b, clip, clip_heldout, harden, teacher, package. Each is
seeded and resumes where it was interrupted; without --stage they run one after the other. About
three hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from assets import clip as clips
from assets.data import POOLS, render_pool
from assets.vae import reconstruction_error, train_vae

STAGES = ("pool", "vae", *clips.ARCHITECTURES, "harden", "teacher", "package")


def run(stage: str, work: Path, out: Path) -> None:
    if stage == "pool":
        for name in (*POOLS, "valid"):
            render_pool(work, name)
    elif stage == "vae":
        vae = train_vae(work)
        images, _ = render_pool(work, "valid")
        print(f"vae: mse {reconstruction_error(vae, images[:500]):.5f} on [-1, 1]")
        vae.save_pretrained(work / "vae")
    elif stage in clips.ARCHITECTURES:
        tokenizer = clips.tokenizer_of(work, stage)
        model = clips.train_clip(stage, work, tokenizer)
        print(
            f"{stage}: right caption among near misses {clips.hard_accuracy(model, tokenizer):.3f}"
        )
        half = model if stage in clips.REWARDS else clips.text_tower(model)
        half.save_pretrained(work / stage)
        tokenizer.save_pretrained(work / stage)
    elif stage == "harden":
        from assets.harden import harden_clip, pair_accuracy

        for name in (*clips.REWARDS, *clips.EYES):
            tokenizer = clips.tokenizer_of(work, name)
            model = harden_clip(name, work, tokenizer)
            print(
                f"{name}: right caption among near misses "
                f"{clips.hard_accuracy(model, tokenizer):.3f}, better of two images "
                f"{pair_accuracy(model, tokenizer):.3f}, right relation "
                f"{clips.relation_accuracy(model, tokenizer):.3f}"
            )
            half = model if name in clips.REWARDS else clips.text_tower(model)
            half.save_pretrained(work / name)
    elif stage == "teacher":
        from assets.teacher import train_teacher

        train_teacher(work)
    else:
        from assets.package import package

        package(work, out)


def reuse(work: Path, out: Path) -> None:
    """Starts a work directory from shipped assets, so that training goes on from them.

    The autoencoder and the text towers are taken as they are (their stages need not run again);
    the transformer and the reward models are where their stages begin.
    """
    shutil.copytree(out / "pipeline" / "vae", work / "vae", dirs_exist_ok=True)
    shutil.copytree(out / "pipeline" / "transformer", work / "teacher", dirs_exist_ok=True)
    for name, suffix in {"encoder_a": "", "encoder_b": "_2"}.items():
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(out / "pipeline" / (part + suffix), work / name, dirs_exist_ok=True)
    for name in clips.REWARDS:
        shutil.copytree(out / name, work / name, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("build/assets"))
    parser.add_argument("--out", type=Path, default=Path("src/tiltflow/assets"))
    parser.add_argument("--reuse", action="store_true", help="begin with the shipped assets")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # On a CPU the fused attention's backward pass is slow for a few dozen tokens.
    torch.backends.cuda.enable_flash_sdp(False)
    if args.reuse:
        reuse(args.work, args.out)
    for stage in [args.stage] if args.stage else STAGES:
        run(stage, args.work, args.out)


if __name__ == "__main__":
    main()

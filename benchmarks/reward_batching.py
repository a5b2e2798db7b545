"""How much faster the CLIP-family rewards score a batch than its images one by one.

The same 32 images and distinct prompts, texts encoded anew each time, once in one call and once in
32; the median of several alternating rounds. With the embedded CLIP, and with random weights in the
shape of CLIP ViT-B/32 (its own processor's 224 pixels), which is bound by arithmetic on a CPU.

    python benchmarks/reward_batching.py [--rounds 5] [--side 256] [--no-large]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tiltflow.paths import resolve_path
from tiltflow.rewards import checked
from tiltflow.rewards.clip_family import CLIPScore
from tiltflow.rewards.preference import PickScore

BATCH = 32


def large_clip(folder: Path) -> str:
    """A random CLIP in the shape of ViT-B/32, with the embedded CLIP's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(resolve_path("packaged:clip"))
    text = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    CLIPModel(CLIPConfig(text_config=text)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return str(folder)


def seconds(reward: CLIPScore, images: Tensor, prompts: list[str], at_once: int) -> float:
    """One scoring of all images, `at_once` a call, with an empty cache of texts."""
    reward._cache.clear()
    start = time.perf_counter()
    for i in range(0, len(images), at_once):
        rows = prompts[i : i + at_once]
        checked(reward, images[i : i + at_once], rows, [{}] * len(rows))
    return time.perf_counter() - start


@torch.no_grad()
def measure(reward: CLIPScore, images: Tensor, rounds: int, label: str, console: Console) -> None:
    prompts = [f"a red circle and {i} blue stars" for i in range(len(images))]
    seconds(reward, images, prompts, BATCH), seconds(reward, images[:2], prompts[:2], 1)
    times = [[seconds(reward, images, prompts, n) for n in (BATCH, 1)] for _ in range(rounds)]
    batched, single = (statistics.median(column) for column in zip(*times, strict=True))
    console.print(
        f"{label}: {len(images)} images at once {batched:.3f} s, one by one {single:.3f} s, "
        f"{single / batched:.1f} times faster"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=256, help="pixels of the square images")
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    console = Console()
    random = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, args.side, args.side, generator=random)
    console.print(f"{torch.get_num_threads()} threads, {args.side} × {args.side} pixels")
    measure(CLIPScore("packaged:clip"), images, args.rounds, "clipscore, embedded", console)
    measure(PickScore("packaged:clip"), images, args.rounds, "pickscore, embedded", console)
    if args.large:
        with tempfile.TemporaryDirectory() as folder:
            reward = CLIPScore(large_clip(Path(folder)))
        measure(reward, images, args.rounds, "clipscore, shape of ViT-B/32", console)


if __name__ == "__main__":
    main()

"""What it costs that CLIP-family rewards see one image at a time, and what batches do to the bits.

The same images with `at_once` 1, 2, 4, 8 and 16: milliseconds an image, scored and
back-propagated, the median of alternating rounds; and of a batch of copies of one image, how many
rows differ from the first in any bit. With the embedded CLIPs, and with random weights in the shape
of CLIP ViT-B/32, ViT-L/14 or ViT-H/14 (`--shape`), at their 224 pixels.

    python benchmarks/reward_batching.py [--rounds 5] [--side 64] [--device cuda --shape L H]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tiltflow.rewards import checked
from tiltflow.rewards.zoo.clip_family import CLIPScore, Preprocessing

SIZES = (1, 2, 4, 8, 16)
IMAGES = 32
TOWERS = {
    "B": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12, "patch_size": 32},
    "L": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
          "num_attention_heads": 16, "patch_size": 14},
    "H": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
          "num_attention_heads": 16, "patch_size": 14},
}  # fmt: skip
"""Vision towers, as in the configurations of the published CLIPs."""


def random_clip(shape: str, device: torch.device) -> CLIPScore:
    """A reward whose vision tower has random weights in a published shape."""
    reward = CLIPScore("packaged:clip", device)
    config = CLIPConfig(
        text_config=reward.model.config.text_config.to_dict(),
        vision_config=TOWERS[shape],
        projection_dim=reward.model.config.projection_dim,
    )
    reward.model = CLIPModel(config).requires_grad_(False).eval().to(device)
    old = reward.preprocessing
    reward.preprocessing = Preprocessing(224, (224, 224), old.mean, old.std)
    return reward


def seconds(reward: CLIPScore, images: Tensor, prompts: list[str], gradient: bool) -> float:
    x = images.clone().requires_grad_(gradient)
    begin = time.perf_counter()
    with torch.set_grad_enabled(gradient):
        scores = checked(reward, x, prompts, [{}] * len(prompts))
        if gradient:
            torch.autograd.grad(scores.sum(), x)
    scores.sum().item()  # waits for an accelerator
    return time.perf_counter() - begin


def places(reward: CLIPScore, image: Tensor) -> int:
    """Of a batch of copies of one image, the rows that differ from the first."""
    with torch.no_grad():
        batch = image[None].expand(reward.at_once, -1, -1, -1)
        features = reward.image_features(batch)
    return sum(not torch.equal(row, features[0]) for row in features)


def measure(reward: CLIPScore, images: Tensor, rounds: int, label: str, console: Console) -> None:
    prompts = [f"a red circle and {i} blue stars" for i in range(len(images))]
    times: dict[tuple[int, bool], list[float]] = {}
    different = {}
    for _ in range(rounds + 1):  # the first round is a rehearsal
        for size in SIZES:
            reward.at_once = size
            for gradient in (False, True):
                spent = seconds(reward, images, prompts, gradient)
                times.setdefault((size, gradient), []).append(spent)
            different[size] = places(reward, images[0])
    for size in SIZES:
        plain, both = (
            1000 * statistics.median(times[size, gradient][1:]) / len(images)
            for gradient in (False, True)
        )
        console.print(
            f"{label}, {size:2} at once: {plain:.2f} ms an image, with its gradient {both:.2f} ms; "
            f"{different[size]} of {size} places differ",
            highlight=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=64, help="pixels of the square images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", nargs="*", default=[], choices=sorted(TOWERS))
    args = parser.parse_args()
    console, device = Console(width=120), torch.device(args.device)
    random = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, args.side, args.side, generator=random).to(device)
    console.print(f"{device}, {torch.get_num_threads()} threads, {args.side} × {args.side} pixels")
    for name in ("clip", "clip_heldout"):
        reward = CLIPScore(f"packaged:{name}", device)
        measure(reward, images, args.rounds, f"embedded {name}", console)
    for shape in args.shape:
        reward = random_clip(shape, device)
        measure(reward, images, args.rounds, f"ViT-{shape}", console)


if __name__ == "__main__":
    main()

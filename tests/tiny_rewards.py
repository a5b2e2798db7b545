"""Tiny random models for the rewards' tests, images to score, and the checks all rewards share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tiltflow.rewards.base import Metadata, Reward, checked

WORDS = ("a", "red", "blue", "circle", "star")
PROMPTS = ["a red circle", "a blue star", "a star"]
FIGURES = Path(__file__).parent / "data" / "open_clip.safetensors"
"""Weights, inputs and features of a tiny open_clip model (scripts/open_clip_figures.py)."""
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def write_clip(folder: Path, seed: int = 0, resize: int = 16, act: str = "quick_gelu") -> str:
    """A tiny random CLIP model with its tokenizer and its image processor."""
    vocab = {word + "</w>": i for i, word in enumerate(WORDS)}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        for token in (letter, letter + "</w>"):
            vocab.setdefault(token, len(vocab))
    merges = []
    for word in WORDS:
        have = ""
        for i, letter in enumerate(word):
            end = "</w>" if i == len(word) - 1 else ""
            if have:
                merges.append((have, letter + end))
            have += letter + end
            vocab.setdefault(have, len(vocab))
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = len(vocab), len(vocab) + 1
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=8)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"hidden_act": act}
    text = (
        sizes
        | ids
        | {
            "num_hidden_layers": 1,
            "vocab_size": len(vocab),
            "max_position_embeddings": 8,
            "pad_token_id": tokenizer.eos_token_id,
        }
    )
    vision = sizes | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": 16, "width": 16}
    CLIPImageProcessorPil(
        size={"shortest_edge": resize}, crop_size=crop, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return str(folder)


def natural(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random image with some sharp edges, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 4 : height // 2, width // 3 : width // 2] = (250, 40, 10)
    return image


def as_tensor(*images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def pixels_of(path: str, images: Tensor) -> Tensor:
    """The library's own preprocessing by the CLIP at a path."""
    arrays = [x.permute(1, 2, 0).mul(255).round().byte().numpy() for x in images]
    processor = CLIPImageProcessorPil.from_pretrained(path)
    pixels: Tensor = processor(arrays, return_tensors="pt")["pixel_values"]
    return pixels


def assert_rows_do_not_mix(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata] | None = None,
    sizes: Sequence[int] = (2, 3, 5, 9),
) -> Tensor:
    """A batch of n scores what n batches of one do, to the last bit, whatever the row's place and
    company, also with a gradient, and each gradient is that of its row alone; gives the scores."""
    metadata = metadata or [{}] * len(prompts)

    def scored(rows: Sequence[int], gradient: bool = False) -> tuple[Tensor, Tensor | None]:
        x = images[list(rows)].requires_grad_(gradient)
        scores = checked(reward, x, [prompts[i] for i in rows], [metadata[i] for i in rows])
        (slope,) = torch.autograd.grad(scores.sum(), x) if gradient else (None,)
        return scores.detach(), slope

    single = torch.cat([scored([i])[0] for i in range(len(prompts))])
    alone = [scored([i], True)[1] for i in range(len(prompts))] if reward.differentiable else []
    for n in sizes:
        for shift in (0, 1):
            rows = [(i + shift) % len(prompts) for i in range(n)]
            assert torch.equal(scored(rows)[0], single[rows]), f"{n} rows from {shift}"
        if reward.differentiable:
            scores, slope = scored(rows, True)
            assert torch.equal(scores, single[rows]), f"{n} rows with a gradient"
            assert torch.equal(slope, torch.cat([alone[i] for i in rows])), f"gradients of {n} rows"
    return single


def assert_gradient(
    reward: Reward, images: Tensor, prompts: Sequence[str], h: float = 2e-3, rtol: float = 0.02
) -> None:
    """The gradient in the images, against the slope along its signs by finite differences."""
    images = (images * 0.6 + 0.2).requires_grad_(True)
    metadata = [{}] * len(prompts)
    (gradient,) = torch.autograd.grad(checked(reward, images, prompts, metadata).sum(), images)
    direction = gradient.sign()
    with torch.no_grad():
        up, down = (
            checked(reward, images + s * h * direction, prompts, metadata).double().sum()
            for s in (1, -1)
        )
    slope = (up - down) / (2 * h)
    assert slope > 0
    torch.testing.assert_close(gradient.abs().double().sum(), slope, rtol=rtol, atol=0)


def redraw(module: torch.nn.Module, scale: float, seed: int = 0) -> None:
    """Weights of a size that lets every part of a random network matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)

"""The teacher: an SD3 transformer of a few million parameters, trained by flow matching."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from assets.data import POOLS, false_captions, place_labels, render_pool
from assets.train import autocast, batches, chunks, fit
from assets.vae import encode
from tiltflow.flow import shift_sigma
from tiltflow.rewards.worlds import shapes
from tiltflow.rewards.worlds.shapes_checker import read_scene, score

PLACE_BLOCK, PLACE_WEIGHT = 3, 0.1
SHIFT = 2.0  # SD3's is 3, for images of hundreds of times as many pixels
FRESH, GOING_ON = (7000, 8e-4), (1200, 6e-4)  # steps, rate
FALSE = 0.13  # the share of images whose caption is wrong in one respect
PAD_TOKENS = 256  # what the pipeline appends by default when text_encoder_3 is absent


def new_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=224,
        caption_projection_dim=192,
        pooled_projection_dim=224,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def build_pipeline(work: Path, transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(work / "encoder_a").eval(),
        tokenizer=CLIPTokenizer.from_pretrained(work / "encoder_a"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(work / "encoder_b").eval(),
        tokenizer_2=CLIPTokenizer.from_pretrained(work / "encoder_b"),
        text_encoder_3=None,
        tokenizer_3=None,
    )


@torch.no_grad()
def encode_texts(
    pipe: StableDiffusion3Pipeline, texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings (N, 12, 224) without padding tokens, and pooled ones (N, 224)."""
    parts = [
        pipe.encode_prompt(t, t, t, do_classifier_free_guidance=False, max_sequence_length=0)
        for t in (texts[s] for s in chunks(len(texts), 512))
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts])


def latents(work: Path, vae: AutoencoderKL) -> tuple[torch.Tensor, list[str]]:
    """Scaled latents (N, 8, 8, 8) in fp16 of both render pools, computed once, and the captions."""
    path, texts = work / "latents.npy", []
    pools = [render_pool(work, name) for name in POOLS]
    for _, names in pools:
        texts += names
    if not path.exists():
        out = []
        with torch.no_grad():
            for images, _ in pools:
                out += [encode(vae, images[s]).half() for s in chunks(len(images), 200)]
        z = (torch.cat(out).float() - vae.config.shift_factor) * vae.config.scaling_factor
        np.save(path, z.half().numpy())
    return torch.from_numpy(np.load(path)), texts


@torch.no_grad()
def sample(pipe, transformer, embeds, pooled, steps, guidance, seed) -> np.ndarray:
    """Euler samples, (N, 64, 64, 3) uint8; the last row of the tables is the empty prompt."""
    generator = torch.Generator().manual_seed(seed)
    n = len(embeds) - 1
    x = torch.randn(n, 8, 8, 8, generator=generator)
    u = torch.linspace(1, 0, steps + 1)
    grid = shift_sigma(u, SHIFT)
    context = torch.cat([embeds[-1:].expand(n, -1, -1), embeds[:n]])
    pool = torch.cat([pooled[-1:].expand(n, -1), pooled[:n]])
    for now, then in itertools.pairwise(grid):
        with autocast():
            t = (now * 1000).expand(2 * n)
            v = transformer(torch.cat([x, x]), context, pool, t, return_dict=False)[0].float()
        plain, conditional = v.chunk(2)
        x = x + (then - now) * (plain + guidance * (conditional - plain))
    config = pipe.vae.config
    images = pipe.vae.decode(x / config.scaling_factor + config.shift_factor).sample
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def evaluate(pipe, transformer, n=192, steps=25, guidance=4.0, seed=7) -> dict[str, float]:
    """Strict and soft accuracy on held-out captions, and strict by category."""
    captions = shapes.balanced(True, n)
    embeds, pooled = encode_texts(pipe, [c.text for c in captions] + [""])
    images = sample(pipe, transformer, embeds, pooled, steps, guidance, seed)
    results = np.array([score(read_scene(i), c) for i, c in zip(images, captions, strict=True)])
    table = {"strict": results[:, 0].mean(), "soft": results[:, 1].mean()}
    for k, category in enumerate(shapes.CATEGORIES):
        table[category] = results[k :: len(shapes.CATEGORIES), 0].mean()
    return {k: round(float(v), 3) for k, v in table.items()}


class PlaceHead(nn.Module):
    """A second task of the teacher's middle: to name what each part of the clean image shows.

    A linear head on the image tokens of one block names the shape and the colour at the 2x2
    latent places of each token. It is thrown away afterwards; with it, text and layout meet in
    the middle of the network sooner than by the velocity loss alone.
    """

    def __init__(self, transformer: SD3Transformer2DModel, labels: np.ndarray) -> None:
        super().__init__()
        self.sizes = (len(shapes.SHAPES) + 1, len(shapes.COLOURS) + 1)
        self.head = nn.Linear(192, 4 * sum(self.sizes))
        n = len(labels)
        grid = torch.from_numpy(labels).view(n, 4, 2, 4, 2, 2).permute(0, 1, 3, 2, 4, 5)
        self.labels = grid.reshape(n, 16, 4, 2)
        self.tokens: list[torch.Tensor] = []
        block = transformer.transformer_blocks[PLACE_BLOCK]
        block.register_forward_hook(lambda module, inputs, out: self.tokens.append(out[1]))

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropies of both names for the batch just run, whose rows are `index`."""
        tokens = self.tokens.pop().float()
        self.tokens.clear()
        guess = self.head(tokens).view(*tokens.shape[:2], 4, sum(self.sizes))
        truth = self.labels[index].long()
        parts = zip(guess.split(self.sizes, -1), truth.unbind(-1), strict=True)
        return sum(F.cross_entropy(g.flatten(0, 2), t.flatten()) for g, t in parts)


def start(work: Path) -> SD3Transformer2DModel:
    """A new transformer, with the weights of work/teacher where an earlier one is there."""
    transformer = new_transformer()
    if (work / "teacher").exists():
        earlier = SD3Transformer2DModel.from_pretrained(work / "teacher")
        transformer.load_state_dict(earlier.state_dict())
    return transformer


def train_teacher(work: Path, batch: int = 128, seed: int = 33) -> None:
    """Flow matching (METHOD section 1) with caption dropout, and the second task of `PlaceHead`.

    Some captions are false, as those of images from the web are: the teacher is good, and what it
    gets wrong is what a reward can put right (docs/lab/demo_settings.md, "Which teacher").
    """
    torch.manual_seed(seed)
    steps, rate = GOING_ON if (work / "teacher").exists() else FRESH
    transformer = start(work)
    ema = copy.deepcopy(transformer).requires_grad_(False)
    pipe = build_pipeline(work, transformer)
    z, texts = latents(work, pipe.vae)
    labels = [place_labels(work, name, 8) for name in POOLS]
    helper = PlaceHead(transformer, np.concatenate(labels))
    names = sorted(set(texts))
    embeds, pooled = encode_texts(pipe, [*names, ""])
    row = {name: i for i, name in enumerate(names)}
    rows = torch.tensor([row[t] for t in texts])
    misses = torch.from_numpy(false_captions(names, 16, seed))
    fast = torch.compile(transformer)

    def loss(generator: torch.Generator, step: int) -> torch.Tensor:
        # Late in training, some batches carry the pipeline's zero padding for the absent T5.
        padded = step > 0.8 * steps and step % 6 == 0
        size = batch // 8 if padded else batch
        index = batches(len(z), size, generator)
        x0, noise = z[index].float(), torch.randn(size, 8, 8, 8, generator=generator)
        u = torch.sigmoid(torch.randn(size, generator=generator))
        sigma = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1)
        drop = torch.rand(size, generator=generator) < 0.1
        told = rows[index]
        false = torch.rand(size, generator=generator) < FALSE
        miss = misses[told, torch.randint(misses.shape[1], (size,), generator=generator)]
        which = torch.where(drop, len(names), torch.where(false, miss, told))
        context = embeds[which]
        if padded:
            context = torch.cat([context, torch.zeros(size, PAD_TOKENS, context.shape[-1])], 1)
        x = (1 - sigma) * x0 + sigma * noise
        with autocast():
            t = sigma.flatten() * 1000
            model = transformer if padded else fast
            v = model(x, context, pooled[which], t, return_dict=False)[0]
        return (v.float() - (noise - x0)).square().mean() + PLACE_WEIGHT * helper.loss(index)

    def after(step: int) -> None:
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(transformer.parameters()), 1 - decay)
        if (step + 1) % 300 == 0:
            print(f"teacher {step + 1} held-out: {evaluate(pipe, ema, guidance=1.5)}", flush=True)

    trained = [*transformer.parameters(), *helper.parameters()]
    optimizer = torch.optim.AdamW(
        trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    modules = {"transformer": transformer, "ema": ema, "helper": helper}
    fit("teacher", modules, [optimizer], loss, steps, work, seed, after)
    ema.save_pretrained(work / "teacher")

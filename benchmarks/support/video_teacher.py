"""A small Wan 2.1 pipeline trained on the world of moving shapes, in the format of the real one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from support import moving_shapes as world
from tiltflow.flow import interpolate, shift_sigma
from tiltflow.models.pipelines.solvers import network_time

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from assets.train import batches, chunks, fit

TOKENS = 8
"""Of a prompt; it has six with the end of the text."""
CHANNELS = 8
SHIFT = 2.0  # the published 3 is for videos of hundreds of times as many pixels
DROPPED = 0.1
"""The share of captions that are empty in training, for guidance."""


@dataclass(frozen=True)
class Scale:
    """How much is trained: the autoencoder's steps on pictures and on videos, and its batch; the
    transformer's, and how many videos it sees."""

    pictures: int = 450
    vae_steps: int = 550
    vae_batch: int = 6
    steps: int = 1700
    batch: int = 48
    videos: int = 4096


def text_encoder() -> tuple[UMT5EncoderModel, T5TokenizerFast]:
    """A token a word. It stays as it is drawn: what it makes of a word differs from that of every
    other, and the transformer learns what each means."""
    words = sorted({word for held in (True, False) for scene in world.scenes(held)
                    for word in scene.text.split()})  # fmt: skip
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5TokenizerFast(vocab=[*special, *((f"▁{w}", -3.0) for w in words)], extra_ids=0)
    config = UMT5Config(
        vocab_size=32, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=0
    )
    torch.manual_seed(5)
    return UMT5EncoderModel(config).eval(), tokenizer


def new_vae() -> AutoencoderKLWan:
    """Four pixels and four frames to a latent cell."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def new_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def build_pipeline(work: Path, transformer: WanTransformer3DModel) -> WanPipeline:
    encoder, tokenizer = text_encoder()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKLWan.from_pretrained(work / "vae"),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
        transformer=transformer,
    )


def drawn_scenes(count: int, generator: torch.Generator) -> list[world.Scene]:
    known = world.scenes(held_out=False)
    return [known[i] for i in batches(len(known), count, generator)]


def clips(count: int, generator: torch.Generator) -> Tensor:
    """Videos of scenes drawn from the training ones, as the autoencoder takes them: (N, 3, F, H, W)
    in [−1, 1]."""
    return world.render(drawn_scenes(count, generator), generator).transpose(1, 2) * 2 - 1


def still_start(vae: AutoencoderKLWan) -> None:
    """Weights as of an autoencoder of pictures that is given videos: nothing looks back in time,
    and a latent frame is its last frame and makes four alike. What Wan's own began with, too."""
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] > 1:
                module.weight[:, :, :-1] = 0
            if isinstance(module, torch.nn.Conv3d) and module.kernel_size == (3, 1, 1):
                out, width = module.weight.shape[:2]
                module.weight[:, :, -1, 0, 0] = torch.eye(width).repeat(out // width, 1)
                module.bias.zero_()


def decoded(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """What the decoder makes before it is cut off at −1 and 1, where there would be no gradient."""
    parts: list[Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda module, given, made: parts.append(made))
    vae.decode(z)
    hook.remove()
    return torch.cat(parts, 2)


def train_vae(work: Path, scale: Scale, seed: int = 11) -> float:
    """First on single frames, then on videos; then each latent channel's mean and deviation.
    Returns the mean square error of unseen videos, on [−1, 1].

    Noise of a twentieth of the latents' deviation smooths them. With the posterior's own, which is
    larger than the signal at first, the shapes were not found in 450 steps.
    """
    torch.manual_seed(seed)
    vae = new_vae()
    still_start(vae)

    def loss(x: Tensor, generator: torch.Generator) -> Tensor:
        z = vae.encode(x).latent_dist.mean
        noise = torch.randn(z.shape, generator=generator) * z.detach().std(0, keepdim=True)
        error = decoded(vae, z + 0.05 * noise) - x
        # the shape is a small part of the frame
        weight = 1 + 9 * (world.spread(x, 1).unsqueeze(1) > world.COLOURED)
        return (weight * error.square()).mean()

    def of_pictures(generator: torch.Generator, step: int) -> Tensor:
        at = int(torch.randint(world.FRAMES, (), generator=generator))
        return loss(clips(2 * scale.vae_batch, generator)[:, :, at : at + 1], generator)

    def of_videos(generator: torch.Generator, step: int) -> Tensor:
        return loss(clips(scale.vae_batch, generator), generator)

    phases = (("pictures", of_pictures, scale.pictures), ("vae", of_videos, scale.vae_steps))
    for name, of, steps in phases:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0)
        fit(name, {"vae": vae}, [optimizer], of, steps, work, seed, every=50)
    vae.eval()
    x = clips(min(64, scale.videos), torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        z = torch.cat([vae.encode(x[s]).latent_dist.mean for s in chunks(len(x), 16)])
        made = torch.cat([vae.decode(z[s]).sample for s in chunks(len(x), 16)])
    by_channel = z.transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=by_channel.mean(1).tolist(), latents_std=by_channel.std(1).tolist()
    )
    vae.save_pretrained(work / "vae")
    return float((made - x).square().mean())


@torch.no_grad()
def latents(work: Path, count: int, seed: int = 21) -> tuple[Tensor, list[str]]:
    """Latents (N, C, T, H, W) of the training videos in the transformer's units, and their
    captions."""
    generator = torch.Generator().manual_seed(seed)
    known = drawn_scenes(count, generator)
    path = work / f"latents_{count}.pt"
    if not path.exists():
        vae, parts = AutoencoderKLWan.from_pretrained(work / "vae").eval(), []
        mean, std = (
            torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        for s in chunks(count, 64):
            x = world.render(known[s], generator).transpose(1, 2) * 2 - 1
            parts.append((vae.encode(x).latent_dist.mean - mean) / std)
        torch.save(torch.cat(parts).half(), path)
    return torch.load(path, weights_only=True), [scene.text for scene in known]


@torch.no_grad()
def encode_texts(pipe: WanPipeline, texts: list[str]) -> Tensor:
    """(N, TOKENS, 64)."""
    embeds, _ = pipe.encode_prompt(
        texts, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    return embeds


@torch.no_grad()
def copies(work: Path, asked: list[world.Scene], seed: int = 41) -> Tensor:
    """Drawn videos of scenes through the autoencoder and back, (N, F, 3, H, W) in [0, 1]: what no
    network over its latents can surpass."""
    vae = AutoencoderKLWan.from_pretrained(work / "vae").eval()
    x = world.render(asked, torch.Generator().manual_seed(seed)).transpose(1, 2) * 2 - 1
    made = [vae.decode(vae.encode(x[s]).latent_dist.mean).sample for s in chunks(len(x), 18)]
    return world.VIDEOS.decode(torch.cat(made).transpose(1, 2))


def train_teacher(
    work: Path, scale: Scale, look: Callable[[int], None] = lambda step: None, seed: int = 33
) -> None:
    """Flow matching (METHOD §1) with caption dropout; the average is saved as `work`/pipeline, and
    `look(step)` is called after it has been, every 500 steps too."""
    torch.manual_seed(seed)
    transformer = new_transformer()
    ema = copy.deepcopy(transformer).requires_grad_(False)
    pipe = build_pipeline(work, ema)
    z, texts = latents(work, scale.videos)
    names = sorted(set(texts))
    embeds = encode_texts(pipe, [*names, ""])
    rows = torch.tensor([names.index(text) for text in texts])

    def loss(generator: torch.Generator, step: int) -> Tensor:
        index = batches(len(z), scale.batch, generator)
        x0 = z[index].float()
        noise = torch.randn(x0.shape, generator=generator)
        # most at high levels, where it is settled which way a shape goes
        sigma = shift_sigma(torch.sigmoid(torch.randn(scale.batch, generator=generator)), 4.0)
        empty = torch.rand(scale.batch, generator=generator) < DROPPED
        context = embeds[torch.where(empty, len(names), rows[index])]
        x = interpolate(x0, noise, sigma)
        v = transformer(x, network_time(sigma), context, return_dict=False)[0]
        return (v - (noise - x0)).square().mean()

    def after(step: int) -> None:
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(transformer.parameters()), 1 - decay)
        if (step + 1) % 500 == 0 and step + 1 < scale.steps:
            pipe.save_pretrained(work / "pipeline")
            look(step + 1)

    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.01
    )
    modules = {"transformer": transformer, "ema": ema}
    fit("teacher", modules, [optimizer], loss, scale.steps, work, seed, after)
    pipe.save_pretrained(work / "pipeline")
    look(scale.steps)

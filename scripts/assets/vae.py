"""The autoencoder: 64×64 images to 8 channels of 8×8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from assets.data import render_pool
from assets.train import autocast, batches, chunks, fit, tensor_images


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )


def train_vae(work: Path, steps: int = 3600, batch: int = 16, seed: int = 11) -> AutoencoderKL:
    """L1 + ½ MSE + 1e-5 KL; then scale and shift set so that latents have mean 0, std 1."""
    images, _ = render_pool(work, "pool")
    torch.manual_seed(seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.0)

    def loss(generator: torch.Generator, step: int) -> torch.Tensor:
        index = batches(len(images), batch, generator).sort().values.numpy()
        x = tensor_images(np.asarray(images[index])) * 2 - 1
        with autocast():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            out = vae.decode(posterior.mean + posterior.std * noise).sample
        error = out.float() - x
        kl = posterior.kl().float().mean()
        return error.abs().mean() + 0.5 * error.square().mean() + 1e-5 * kl

    fit("vae", {"vae": vae}, [optimizer], loss, steps, work, seed)
    vae.eval()
    with torch.no_grad():
        z = torch.cat([encode(vae, images[s]) for s in chunks(2000, 100)])
    vae.register_to_config(shift_factor=float(z.mean()), scaling_factor=float(1 / z.std()))
    return vae


def encode(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Posterior means of uint8 (B, 64, 64, 3) images, unscaled: (B, 8, 8, 8)."""
    return vae.encode(tensor_images(np.asarray(images)) * 2 - 1).latent_dist.mean


def reconstruction_error(vae: AutoencoderKL, images: np.ndarray) -> float:
    x = tensor_images(np.asarray(images)) * 2 - 1
    with torch.no_grad():
        return float(F.mse_loss(vae.decode(vae.encode(x).latent_dist.mean).sample, x))

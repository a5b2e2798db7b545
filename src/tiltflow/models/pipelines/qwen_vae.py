"""What the families share whose autoencoder is Qwen-Image's: a video's, of which images are the
first frame, with a mean and a deviation a channel; and tokens of square patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tiltflow.core.transfer import to_device
from tiltflow.models.pipelines.backbone import PipelineBackbone
from tiltflow.models.pipelines.limits import is_number, shown

QWEN_VAE = {"_class_name": "AutoencoderKLQwenImage"}
"""The published one: its class's defaults in diffusers, statistics included."""

QWEN3_VL_4B = {
    "_class_name": "Qwen3VLModel",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}
"""The sizes of the repository Qwen/Qwen3-VL-4B-Instruct."""

WHOLE = {
    **dict.fromkeys(("base_dim", "z_dim", "out_hidden_size"), (1, 65_536)),
    **dict.fromkeys(("dim_mult", "input_channels", "spatial_merge_size"), (1, 64)),
    **dict.fromkeys(("num_res_blocks", "depth"), (0, 1_000)),
    "temporal_patch_size": (1, 64),
    "num_position_embeddings": (1, 1_000_000),
    "deepstack_visual_indexes": (0, 1_000),
}
"""Of the autoencoder, and of the eye that text encoders of the Qwen-VL kind have."""
DEPTHS = ("num_res_blocks", "depth")
WIDTHS = ("base_dim", "z_dim", "out_hidden_size", "num_position_embeddings")
MOST_LEVELS = 8
"""Resolutions of an autoencoder: each halves the side."""


class QwenVaeBackbone(PipelineBackbone):
    """Latents are the autoencoder's, (z_dim, side/8, side/8), packed for the transformer only."""

    axes = 3

    def _check_parts(self) -> None:
        """Raises ValueError where the autoencoder's lists do not go with its sizes."""
        vae = self.part_config(self.pipeline, "vae")
        said = f"the autoencoder in {self.path} has"
        levels, halves = vae["dim_mult"], vae["temperal_downsample"]
        if not isinstance(levels, list) or not 2 <= len(levels) <= MOST_LEVELS:
            raise ValueError(f"{said} dim_mult={shown(levels)}, no list of 2 to {MOST_LEVELS}")
        flags = isinstance(halves, list) and all(isinstance(value, bool) for value in halves)
        if not flags or len(halves) != len(levels) - 1:
            raise ValueError(
                f"{said} temperal_downsample={shown(halves)}, which is not {len(levels) - 1} "
                "times true or false, one less than its dim_mult has"
            )
        if vae["attn_scales"]:
            raise ValueError(f"{said} attn_scales={shown(vae['attn_scales'])}, which must be empty")
        for key, least in (("latents_mean", -math.inf), ("latents_std", 0.0)):
            values = vae[key]
            whole = isinstance(values, list) and len(values) == vae["z_dim"]
            if not whole or not all(is_number(value) and value > least for value in values):
                raise ValueError(
                    f"{said} {key}={shown(values)}, which is not the {vae['z_dim']} numbers "
                    f"{'above 0 ' if least == 0 else ''}of its z_dim"
                )

    def _factor(self, vae: Mapping[str, Any]) -> int:
        return int(2 ** len(vae["temperal_downsample"]))

    def _latent_channels(self, vae: Mapping[str, Any]) -> int:
        return int(vae["z_dim"])

    def _patch(self, transformer: Mapping[str, Any]) -> int:
        return math.isqrt(self.packing)

    def _pack(self, x: Tensor) -> Tensor:
        """(B, C, H, W) as tokens (B, H/p · W/p, C·p²), a channel's p × p cells side by side."""
        (batch, channels, height, width), p = x.shape, self.geometry.patch
        cells = x.reshape(batch, channels, height // p, p, width // p, p)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)

    def _unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `_pack`."""
        p = self.geometry.patch
        cells = tokens.reshape(len(tokens), height // p, width // p, -1, p, p)
        return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)

    def _to_vae(self, latents: Tensor) -> Tensor:
        """Frames (B, C, T, H, W), one of a picture's latents (B, C, H, W); divided by 1/std, as the
        pipelines do."""
        if latents.ndim == 4:
            latents = latents.unsqueeze(2)
        mean, std = (
            torch.tensor(self.vae.config[key]).view(1, -1, 1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        inverse = to_device(1.0 / std, latents.device)
        return latents / inverse + to_device(mean, latents.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] from latents, differentiable,
        fp32."""
        z = self._to_vae(latents.float()).to(self.vae.dtype)
        videos: Tensor = self.vae.decode(z, return_dict=False)[0].float()
        return self.medium.decode(videos[:, :, 0] if latents.ndim == 4 else videos.transpose(1, 2))

    def checkpoint_decoder(self) -> None:
        """By hand, since diffusers has none for these autoencoders."""
        decoder = self.vae.decoder
        for block in (decoder.mid_block, *decoder.up_blocks):
            block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A block's forward that is computed again in the backward pass.

    A block hands its last frames on to its next call in a list that it writes into, with a count of
    the places used: each pass works on copies of both, because a second one would find what the
    first had left there.
    """

    def once(
        x: Tensor, feat_cache: list[Any] | None = None, feat_idx: list[int] | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        if not torch.is_grad_enabled() or feat_cache is None or feat_idx is None:
            return forward(x, feat_cache=feat_cache, feat_idx=feat_idx, **given)
        before, start = list(feat_cache), feat_idx[0]

        def alone(x: Tensor) -> tuple[Tensor, list[Any], int]:
            cache, place = list(before), [start]
            return forward(x, feat_cache=cache, feat_idx=place, **given), cache, place[0]

        found, feat_cache[:], feat_idx[0] = checkpoint(alone, x, use_reentrant=False)
        return found

    return once

"""Latents as FLUX.1's tokens: 2×2 cells each, with three-axis positions (FLUX.1 and Chroma)."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.core.transfer import to_device
from tiltflow.models.pipelines.backbone import PipelineBackbone


class FluxTokens(PipelineBackbone):
    """A pipeline that packs the autoencoder's latents, (16, side/8, side/8), for its transformer
    only; see `PipelineBackbone` for arguments and errors."""

    axes = 3
    packing = 4

    def _begin(self) -> None:
        self._positions: dict[tuple[int, int], Tensor] = {}

    def _image_ids(self, height: int, width: int) -> Tensor:
        """The tokens' positions, kept on the device."""
        if (height, width) not in self._positions:
            ids = self.pipe._prepare_latent_image_ids(
                1, height // 2, width // 2, torch.device("cpu"), torch.float32
            )
            self._positions[height, width] = to_device(ids, self.device)
        return self._positions[height, width]

    def _pack(self, x: Tensor) -> Tensor:
        """(B, C, H, W) as tokens (B, H/2 · W/2, 4C)."""
        return self.pipe._pack_latents(x.contiguous(), *x.shape)

    def _unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `_pack`."""
        factor = self.geometry.factor
        return self.pipe._unpack_latents(tokens, height * factor, width * factor, factor)

    def _to_vae(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

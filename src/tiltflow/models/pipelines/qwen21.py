"""Qwen-Image-2.1's transformer for rows of text that do not know their neighbours.

diffusers' own pass has one row of positions for a whole batch, so that a longer prompt moves the
images of all others; and it reads positions back from the device in every pass, where shapes alone
have none. Here positions are made on the host, a row each, and the rest is the same arithmetic in
the same order: for text and one image, without a key-value cache.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21AttnProcessor
from torch import Tensor
from torch.nn import functional as F

from tiltflow.core.transfer import to_device


class RowProcessor(QwenImage21AttnProcessor):
    """Text attends to the text before it, the image to everything; `rotary_emb` is a row each,
    (B, S, 1, D/2) complex, and `segments` begin with the text's (0, T, True)."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        rotary_emb: Tensor,
        segments: list[tuple[int, int, bool]],
        key_valid: Tensor | None = None,
        **others: object,
    ) -> Tensor:
        text, head = segments[0][1], attn.inner_dim // attn.heads
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, head))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = _turned(attn.norm_q(query).to(value.dtype), rotary_emb)
        key = _turned(attn.norm_k(key).to(value.dtype), rotary_emb)
        known = None if key_valid is None else key_valid[:, None, None]
        before = torch.ones(text, text, dtype=torch.bool, device=query.device).tril()[None, None]
        causal = before if known is None else before & known[..., :text]
        words = dispatch_attention_fn(
            query[:, :text], key[:, :text], value[:, :text], attn_mask=causal
        )
        image = dispatch_attention_fn(query[:, text:], key, value, attn_mask=known)
        joined = torch.cat([words, image], dim=1).flatten(2, 3).type_as(query)
        out: Tensor = attn.to_out[1](attn.to_out[0](joined))
        return out


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Heads (B, S, H, D) rotated, each pair of numbers as a complex one."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


class RowTransformer(QwenImage21Transformer2DModel):
    """A `QwenImage21Transformer2DModel` that `by_rows` has changed the class of."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        positions: Tensor,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        """The image's tokens (B, N, C) from them and the text's (B, T, D), σ (B,), the positions
        (B, T + N, 3) of both, and which of them are no filling, (B, T + N) or None for all."""
        me: Any = self  # diffusers leaves its models untyped
        text, image = me.txt_in(encoder_hidden_states), me.img_in(hidden_states)
        x, turns = torch.cat([text, image], dim=1), _turns(me.pos_embed, positions)
        drawn: Tensor | None = None
        if me.config.causal_condition:  # the text is modulated as at σ = 0
            timestep = torch.cat([timestep, timestep.new_zeros(1)])
            drawn = torch.arange(x.shape[1], device=x.device) >= text.shape[1]
        time = me.time_text_embed(timestep, image)
        modulation, segments = me.modulation(time), [(0, text.shape[1], True)]
        for block in me.transformer_blocks:
            given = (x, modulation, turns, None, drawn, None, None, None, segments, key_valid)
            if torch.is_grad_enabled() and me.gradient_checkpointing:
                x = me._gradient_checkpointing_func(block, *given)
            else:
                x = block(*given)
        out: Tensor = me.proj_out(me.norm_out(x, time, drawn))
        return out[:, text.shape[1] :]


def _turns(rope: Any, positions: Tensor) -> Tensor:
    """The rotations (B, S, 1, D/2) of positions (B, S, 3), by the network's own tables."""
    tables = rope.freqs = [to_device(table, positions.device) for table in rope.freqs]
    axes = zip(tables, positions.unbind(-1), strict=True)
    return torch.cat([table[at] for table, at in axes], dim=-1).unsqueeze(2)


def by_rows(network: Any) -> None:
    """Changes a transformer in place."""
    network.__class__ = RowTransformer
    network.set_attn_processor(RowProcessor())


def positions_of(lengths: Tensor, text: int, height: int, width: int) -> Tensor:
    """The positions (B, text + height · width, 3) of prompts of these `lengths`, filled up to
    `text`, and an image each: frame, row and column. Tokens of text count up on all three; an
    image stays on the frame behind its own text, its rows and columns around 0."""
    count = torch.arange(text)[:, None].expand(len(lengths), -1, 3)[:, :text]
    rows = torch.arange(-(height - height // 2), height // 2).repeat_interleave(width)
    columns = torch.arange(-(width - width // 2), width // 2).repeat(height)
    grid = torch.stack([rows, columns], -1).expand(len(lengths), -1, 2)
    frames = lengths[:, None, None].expand(-1, height * width, 1)
    return torch.cat([count, torch.cat([frames, grid], -1)], 1)


def validity_of(mask: Tensor | None, image: int) -> Tensor | None:
    """Which tokens of text and image are no filling, of a text's (B, T) mask or None."""
    return None if mask is None else F.pad(mask, (0, image), value=True)

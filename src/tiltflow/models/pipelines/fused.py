"""SD3's blocks with fewer passes over their tensors, for training in 16 bits.

The same arithmetic as diffusers' blocks in another grouping: a modulation or a gate is one pass
(`addcmul`) and not two, query and key norms are torch's own RMS norm, on rows as the projections
leave them. Rounding differs by a bit of the 16-bit type here and there; where all is computed in
fp32 nothing is fused. Under autocast over fp32 weights what is fp32 in diffusers' blocks stays so.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tiltflow.core.precision import autocast_in_force

TWICE = 2 * math.sqrt(2 / math.pi)


class FusedBlock(JointTransformerBlock):
    """A `JointTransformerBlock` that `fuse_blocks` has changed the class of."""

    def forward(  # type: ignore[override]  # the text's None, as diffusers' own has it
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Image tokens (B, N, d), text tokens (B, T, d), timestep embedding (B, d); the text's
        result is None in the last block."""
        if joint_attention_kwargs or self._chunk_size is not None:
            plainly: Any = super().forward
            return plainly(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        x, text, signal = hidden_states, encoder_hidden_states, F.silu(temb)
        image = _chunks(self.norm1.linear(signal), 9 if self.use_dual_attention else 6)
        words = _chunks(self.norm1_context.linear(signal), 2 if self.context_pre_only else 6)
        plain = _norm(self.norm1.norm, x)
        if self.context_pre_only:  # the continuous norm gives the scale first
            normed_text = _modulated(_norm(self.norm1_context.norm, text), words[1], words[0])
        else:
            normed_text = _modulated(_norm(self.norm1_context.norm, text), words[0], words[1])
        attended, attended_text = _joint_attention(
            self.attn, _modulated(plain, image[0], image[1]), normed_text
        )
        x = torch.addcmul(x, image[2], attended)
        if self.use_dual_attention:
            second = _attention(self.attn2, _modulated(plain, image[6], image[7]))
            x = torch.addcmul(x, image[8], second)
        inside = _feed_forward(self.ff, _modulated(_norm(self.norm2, x), image[3], image[4]))
        x = torch.addcmul(x, image[5], inside)
        if self.context_pre_only:
            return None, x
        assert attended_text is not None
        text = torch.addcmul(text, words[2], attended_text)
        modulated = _modulated(_norm(self.norm2_context, text), words[3], words[4])
        inside = _feed_forward(self.ff_context, modulated)
        return torch.addcmul(text, words[5], inside), x


def fuse_blocks(network: nn.Module, mixed: bool = False) -> int:
    """Changes the blocks of an SD3 transformer in 16 bits in place; how many it changed. With
    `mixed` those in fp32 too, which then run under autocast.

    Other networks, and blocks that are not as diffusers makes them, stay as they are.
    """
    count = 0
    for block in network.modules():
        if type(block) is JointTransformerBlock and _as_made(block, mixed):
            block.__class__ = FusedBlock
            count += 1
    return count


def _as_made(block: JointTransformerBlock, mixed: bool) -> bool:
    dtype = block.norm1.linear.weight.dtype
    attentions = [block.attn, *([block.attn2] if block.use_dual_attention else [])]
    norms = [n for a in attentions for n in (a.norm_q, a.norm_k, a.norm_added_q, a.norm_added_k)]
    plain = all(n is None or (type(n) is RMSNorm and n.bias is None) for n in norms)
    feeds = [ff for ff in (block.ff, block.ff_context) if ff is not None]
    plain = plain and all(_tanh_gelu(ff) for ff in feeds)
    narrow = dtype in (torch.bfloat16, torch.float16) or (mixed and dtype == torch.float32)
    return narrow and plain


def _tanh_gelu(feed: nn.Module) -> bool:
    layers = list(feed.net)  # type: ignore[arg-type]
    first, drop = layers[0], layers[1]
    activated = type(first) is GELU and first.approximate == "tanh"
    return activated and len(layers) == 3 and isinstance(drop, nn.Dropout) and drop.p == 0


def _chunks(signal: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, count · d) as `count` of (B, 1, d)."""
    return signal.unsqueeze(1).chunk(count, -1)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A layer norm without weights, diffusers' own class or torch's."""
    return F.layer_norm(x, x.shape[-1:], eps=norm.eps)  # type: ignore[arg-type]


def _modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Under autocast in its type, which several projections of it then need not make each."""
    made = torch.addcmul(shift, normed, 1 + scale)
    return made.to(autocast_in_force(made.device.type) or made.dtype)


def _heads(attn: Any, projected: Tensor, norm: nn.Module | None) -> Tensor:
    """(B, N, d) as normed heads (B, N, heads, d / heads)."""
    x = projected.unflatten(-1, (attn.heads, -1))
    if norm is None:
        return x
    weight: Tensor = norm.weight  # type: ignore[assignment]
    wide = x.to(weight.dtype)  # under autocast fp32, as diffusers' own has it
    return F.rms_norm(wide, x.shape[-1:], weight, norm.eps).to(x.dtype)  # type: ignore[arg-type]


def _joint_attention(attn: Any, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention over image and text tokens together; the text's result unless it is not needed."""
    query, key, value = (
        torch.cat(
            [_heads(attn, own(x), norm), _heads(attn, added(text), added_norm)], dim=1
        ).transpose(1, 2)
        for own, norm, added, added_norm in (
            (attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
            (attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
            (attn.to_v, None, attn.add_v_proj, None),
        )
    )
    y = _attend(query, key, value).transpose(1, 2).flatten(2)
    image, words = y[:, : x.shape[1]], y[:, x.shape[1] :]
    return attn.to_out[0](image), None if attn.context_pre_only else attn.to_add_out(words)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of (B, heads, N, d) each. On a CPU torch's fused kernel is slow in 16 bits, and its
    softmax five times slower than in fp32, which rounds less as well."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value)
    scores = (query @ key.transpose(-2, -1)).float().mul_(query.shape[-1] ** -0.5)
    return scores.softmax(-1).to(value.dtype) @ value


def _feed_forward(layers: Any, x: Tensor) -> Tensor:
    """A `FeedForward` whose activation is GELU by tanh, as `_as_made` has seen."""
    inside = layers.net[0].proj(x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        inside = _Gelu.apply(inside)
    else:
        inside = F.gelu(inside, approximate="tanh")
    out: Tensor = layers.net[2](inside)
    return out


class _Gelu(torch.autograd.Function):
    """GELU by tanh: x (1 + tanh u) / 2 = x σ(2u), u = √(2/π) (x + .044715 x³), in fp32 within.

    torch's kernel takes nearly twice as long on a CPU, for its tanh; its backward is as quick.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.float()
        gate = wide.square().mul_(0.044715).add_(1).mul_(wide).mul_(TWICE).sigmoid_()
        return gate.mul_(wide).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        back: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
        return back


def _attention(attn: Any, x: Tensor) -> Tensor:
    """Attention among the image tokens."""
    query = _heads(attn, attn.to_q(x), attn.norm_q).transpose(1, 2)
    key = _heads(attn, attn.to_k(x), attn.norm_k).transpose(1, 2)
    value = _heads(attn, attn.to_v(x), None).transpose(1, 2)
    y = _attend(query, key, value).transpose(1, 2).flatten(2)
    out: Tensor = attn.to_out[0](y)
    return out

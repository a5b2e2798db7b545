"""Z-Image: the names of the makers' own code (Tongyi-MAI/Z-Image, Apache-2.0)."""

from __future__ import annotations

from itertools import chain

from tiltflow.formats.keys import Layout

_STACKS = ("noise_refiner.{i}.", "context_refiner.{i}.", "layers.{i}.")
_SAME = (
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm1", "attention_norm2",
    "ffn_norm1", "ffn_norm2", "adaLN_modulation.0",
)  # fmt: skip


def _block(at: str) -> list[tuple[str, tuple[str, ...]]]:
    attention = f"{at}attention."
    return [
        (f"{attention}qkv", tuple(f"{attention}{name}" for name in ("to_q", "to_k", "to_v"))),
        (f"{attention}out", (f"{attention}to_out.0",)),
        (f"{attention}q_norm", (f"{attention}norm_q",)),
        (f"{attention}k_norm", (f"{attention}norm_k",)),
        *((f"{at}{name}", (f"{at}{name}",)) for name in _SAME),
    ]


LAYOUT = Layout(
    source="diffusers 0.42 single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers",
    modules={
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
        **{
            name: (name,)
            for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")
        },
        **dict(chain.from_iterable(_block(at) for at in _STACKS)),
    },
    tensors={"x_pad_token": "x_pad_token", "cap_pad_token": "cap_pad_token"},
)

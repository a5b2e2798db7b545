#!/usr/bin/env bash
# A LoRA that was trained with dropout is loaded with its dropout at work: one seed gives another picture in each call.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Behaviour: the file's header holds the LoRA's config, `lora_dropout` among it, as `save_lora_adapter` and the training
#   scripts write it. `load_lora_weights` makes the layers of that config. New layers are in training mode, and nothing sets
#   the mode of the network that they come into. So a pipeline from `from_pretrained`, which is in eval mode, drops out
#   parts of the LoRA in every pass. The numbers come from torch's global generator, not from the call's. The same
#   file without a header acts as it should. Nothing is raised or warned, and the network's own `training` says False.
# One would have guessed: dropout is for training; `from_pretrained` documents that it leaves the model in eval mode, and
#   loading a LoRA is for inference. transformers' own `load_adapter` sets eval mode.
# Who is hurt: whoever ships a few-step LoRA that was trained with dropout: each user's pictures are worse and
#   not repeatable. Whoever evaluates one: scores, pairs of images and figures over seeds have noise of their own. And
#   a reward's gradient or a ratio of log-probabilities through such a LoRA, where the two passes see two networks.
# What helps: `pipe.transformer.eval()` after each `load_lora_weights`; or fuse; or write `lora_dropout` 0 into the header.
#   (PEFT's issue 3753 has the root for `get_peft_model`.)
#
# Output seen (2026-11-29), pictures in 4 steps; distances in units of what the LoRA does to the picture:
#   as trained with dropout 0.00: two calls with one seed 0.00, from the LoRA's own picture 0.00
#   as trained with dropout 0.05: two calls with one seed 0.71, from the LoRA's own picture 0.54
#   the same without its header : two calls with one seed 0.00, from the LoRA's own picture 0.00
#   the same after eval()       : two calls with one seed 0.00, from the LoRA's own picture 0.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q peft==0.21.2 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$work/try.py" <<'PY'
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

logging.set_verbosity_error()
torch.set_num_threads(1)
folder = Path(sys.argv[1])


def pipeline():
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    network.save_pretrained(folder / "base")
    network = SD3Transformer2DModel.from_pretrained(folder / "base")
    assert not any(module.training for module in network.modules())
    absent = ("vae", *(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")))
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=network, **dict.fromkeys(absent)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trained(dropout):
    """A LoRA's file, written as diffusers' training scripts write it."""
    network, draw = pipeline().transformer, torch.Generator().manual_seed(1)
    targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
    network.add_adapter(LoraConfig(r=8, lora_alpha=8, lora_dropout=dropout, target_modules=targets))
    for name, value in network.named_parameters():
        if "lora_" in name:
            value.data = 0.5 * torch.randn(value.shape, generator=draw)
    StableDiffusion3Pipeline.save_lora_weights(
        folder / f"lora_{dropout}",
        transformer_lora_layers=get_peft_model_state_dict(network),
        **_collate_lora_metadata({"transformer": network}),
    )
    return folder / f"lora_{dropout}" / "pytorch_lora_weights.safetensors"


text = torch.Generator().manual_seed(3)
embeds, pooled = torch.randn(1, 5, 32, generator=text), torch.randn(1, 32, generator=text)


def picture(pipe):
    return pipe(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=64, width=64, num_inference_steps=4,
        guidance_scale=1.0, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).images


def seen(title, file, own=None, after=lambda pipe: None):
    """The first picture; how far the second is, and how far the first is from the LoRA's own one."""
    pipe = pipeline()
    base = picture(pipe)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    after(pipe)
    assert not pipe.transformer.training
    first, second = picture(pipe), picture(pipe)
    own = first if own is None else own
    effect = float((own - base).norm())
    noise, off = (float((a - b).norm()) / effect for a, b in ((second, first), (first, own)))
    print(f"{title:28}: two calls with one seed {noise:.2f}, from the LoRA's own picture {off:.2f}")
    return first, noise, off


own, noise, _ = seen("as trained with dropout 0.00", trained(0.0))
assert noise == 0
file = trained(0.05)
_, noise, off = seen("as trained with dropout 0.05", file, own)
assert noise > 0.05 and off > 0.05
bare = file.parent / "bare.safetensors"
save_file(load_file(file), bare)
_, noise, off = seen("the same without its header", bare, own)
assert noise == 0 and off < 1e-4
_, noise, off = seen("the same after eval()", file, own, lambda pipe: pipe.transformer.eval())
assert noise == 0 and off < 1e-4
print("as described")
PY
"$work/venv/bin/python" "$work/try.py" "$work"

"""What a tiny open_clip model makes of given pixels and tokens, for the tests of the mapping of its
weights (`rewards/open_clip.py`).

The model is open_clip's own class in the shape of ViT-H/14 (GELU, one joint input projection an
attention, projections from the right), far smaller and with random weights. Run once, where
`pip install --no-deps open_clip_torch ftfy timm wcwidth` was:

    PYTHONPATH=src:tests python scripts/open_clip_figures.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from tiny_rewards import FIGURES, PROMPTS, as_tensor, natural, pixels_of, write_clip
from transformers import CLIPTokenizer

# open_clip imports torchvision for its image transforms, which nothing here calls.
for name in ("torchvision", "torchvision.ops.misc", "torchvision.transforms"):
    sys.modules[name] = MagicMock()
sys.modules["torchvision.transforms.functional"] = MagicMock()

import open_clip  # noqa: E402
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # noqa: E402

CONTEXT = 8


def tiny(vocabulary: int) -> CLIP:
    """A random open_clip model; all of its weights matter."""
    torch.manual_seed(3)
    vision = CLIPVisionCfg(
        layers=1, width=16, head_width=8, mlp_ratio=2, patch_size=4, image_size=16
    )
    text = CLIPTextCfg(
        context_length=CONTEXT, vocab_size=vocabulary, width=16, heads=2, layers=1, mlp_ratio=2
    )
    model = CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text, quick_gelu=False).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim:  # biases start at 0, scales at 1: a swap of two would not show
                weight.copy_(0.3 * torch.randn(weight.shape) + (weight == 1))
        model.logit_scale.fill_(3.0)
    return model


@torch.no_grad()
def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_clip(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(path)
        pixels = pixels_of(path, as_tensor(*(natural(16, 16, seed) for seed in range(3))))
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    # The tokenizer of open_clip puts 0 behind the end of a text, whose number is the highest.
    tokens = torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])
    model = tiny(len(tokenizer))
    figures = {
        "pixels": pixels,
        "tokens": tokens,
        "image_features": model.encode_image(pixels),
        "text_features": model.encode_text(tokens),
    }
    weights = {f"weights/{name}": value for name, value in model.state_dict().items()}
    about = {"open_clip": open_clip.__version__, "torch": torch.__version__}
    FIGURES.parent.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in (figures | weights).items()}, FIGURES, about)
    print(f"{FIGURES.name}: {FIGURES.stat().st_size} bytes, {about}")


if __name__ == "__main__":
    main()

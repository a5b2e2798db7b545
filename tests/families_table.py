"""What the tests of families need to know of each: one entry a family.

`names` are tiny pipelines of two sizes at least (`tiny_pipelines`; test_other_sizes.py has those of
FLUX.1 and klein, whose last bits depend on how weights are marked), `generator` one that the first
of them may start its student from. `plain` is what its call takes for a pass without guidance,
`guided` for guidance, with the scale that this is here. `batched` says whether its call runs both
passes as one batch. `sizes` are images (height, width) that it can draw. `tokens` is
more than a short prompt's and less than a long one's, with the family's template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    names: tuple[str, ...]
    plain: dict[str, Any]
    guided: tuple[dict[str, Any], float]
    batched: bool
    generator: str | None = None
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (64, 96))
    tokens: int = 64
    recipe: str | None = None
    """The recipes' model: its adapter on the published geometry is `adapter`, by hand: adapted
    modules and, of rank 32, trainable parameters; `blocks` as docs/backbones.md counts them."""
    blocks: str = ""
    adapter: tuple[int, int] = (0, 0)
    alone: bool = False
    """Whether a longer prompt in its call moves the images of all others, as it does not here."""


UNBINNED = {"use_resolution_binning": False}
CASES = {
    "sd3": Case(
        names=("sd3m", "sd35m"),
        plain={"guidance_scale": 1.0},
        guided=({"guidance_scale": 4.5}, 4.5),
        batched=True,
    ),
    "flux": Case(
        names=("flux_dev",),
        plain={"guidance_scale": 3.5},
        guided=({"guidance_scale": 2.0}, 2.0),
        batched=False,
    ),
    "flux2": Case(
        names=("klein_base",),
        plain={"guidance_scale": 1.0},
        guided=({"guidance_scale": 4.0}, 4.0),
        batched=False,
        generator="klein",
    ),
    "chroma": Case(
        names=("chroma", "chroma_wide", "chroma_beta"),
        plain={"guidance_scale": 1.0},
        guided=({"guidance_scale": 4.0}, 4.0),
        batched=False,
        recipe="chroma",
        blocks="19 + 38",
        adapter=(19 * 8 + 38 * 3, (19 * 8 + 38 * 3) * 32 * (3072 + 3072)),
    ),
    "sana": Case(
        names=("sana", "sana_wide", "sana_euler"),
        plain={"guidance_scale": 1.0, **UNBINNED},
        guided=({"guidance_scale": 4.5, **UNBINNED}, 4.5),
        batched=True,
        recipe="sana",
        blocks="20 + 0",
        adapter=(20 * 8, 20 * 8 * 32 * (2240 + 2240)),
    ),
    "z_image": Case(
        names=("z_image", "z_image_wide"),
        plain={"guidance_scale": 0.0},
        guided=({"guidance_scale": 3.0}, 4.0),
        batched=True,
        generator="z_image_turbo",
        recipe="z_image",
        blocks="30 + 0",
        adapter=(30 * 4, 30 * 4 * 32 * (3840 + 3840)),
    ),
    "qwen_image": Case(
        names=("qwen_image", "qwen_image_wide"),
        plain={},
        guided=({"negative_prompt": " ", "true_cfg_scale": 3.0}, 3.0),
        batched=False,
        tokens=36,
        recipe="qwen_image",
        blocks="60 + 0",
        adapter=(60 * 8 - 2, (60 * 8 - 2) * 32 * (3072 + 3072)),
    ),
    "qwen_image_21": Case(
        names=("qwen_image_21", "qwen_image_21_wide"),
        plain={},
        guided=({"negative_prompt": " ", "true_cfg_scale": 3.0}, 3.0),
        batched=False,
        tokens=128,  # it cuts none
        recipe="qwen_image_21",
        blocks="32 + 0",
        adapter=(32 * 4, 32 * 4 * 32 * (4096 + 4096)),
        alone=True,
    ),
    "flux2_dev": Case(
        names=("flux2_dev", "flux2_dev_wide"),
        plain={"guidance_scale": 4.0},
        guided=({"guidance_scale": 2.5}, 2.5),
        batched=False,
        recipe="flux2_dev",
        blocks="8 + 48",
        adapter=(
            8 * 8 + 48 * 2,
            32 * 6144 * (8 * 8 * 2 + 48 * ((1 + 3 + 2 * 3) + (1 + 3 + 1))),
        ),
    ),
    "krea2": Case(
        names=("krea2", "krea2_wide", "krea2_turbo"),
        plain={"guidance_scale": 0.0},
        guided=({"guidance_scale": 3.0}, 4.0),
        batched=False,
        generator="krea2_turbo",
        tokens=36,
        recipe="krea2",
        blocks="28 + 0",
        adapter=(28 * 5, 28 * 32 * (3 * (6144 + 6144) + 2 * (6144 + 1536))),
    ),
    "wan": Case(
        names=("wan", "wan_wide"),
        plain={"guidance_scale": 1.0, "num_frames": 1},
        guided=({"guidance_scale": 4.0, "num_frames": 1}, 4.0),
        batched=False,
        recipe="wan21_1b",
        blocks="30 + 0",
        adapter=(30 * 8, 30 * 8 * 32 * (1536 + 1536)),
    ),
}

PAIRS = [(family, name) for family, case in CASES.items() for name in case.names]

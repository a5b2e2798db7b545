"""An export's own call of its pipeline makes the images of `tiltflow sample`, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families_table import CASES
from students import MODELS, PROMPTS, pictures, request, sampled, student
from test_scheduler import loaded_pipeline

from tiltflow.data.prompts import Prompt
from tiltflow.formats.card import call_of
from tiltflow.formats.contract import read_contract
from tiltflow.models.family import families, family_named
from tiltflow.tasks.export import export_checkpoint

NAMES = (
    "sd35m", "flux1_dev", "flux2_klein_4b", "flux2_dev", "z_image", "chroma", "sana", "qwen_image",
    "qwen_image_21", "krea2", "wan21_1b",
)  # fmt: skip
SIZE = (96, 64)
ALONE = ("qwen_image", "qwen_image_21")
"""Whose pipelines fill prompts up to each other: so several of one call are others, or rounded
otherwise."""


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_the_cards_call_makes_the_images_of_sample(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """As it stands on the card, and not at a square; the tilt at a strength of its own."""
    made = student(tiny_pipeline, name, tmp_path)
    model = made.config.model.model_copy(update={"resolution": SIZE})
    config = made.config.model_copy(update={"model": model})
    export_checkpoint(config, made.checkpoint, made.export)
    contract = read_contract(made.export / "tilt")
    assert contract is not None
    family = family_named(contract.family)
    call, card = call_of(contract, family), (made.export / "README.md").read_text()
    assert ", ".join(f"{key}={value!r}" for key, value in call.items()) in card
    assert (family.caution in card) and bool(family.caution) == (name in (*ALONE, "sana"))
    prompts = PROMPTS[:1] if name in ALONE else PROMPTS
    pipe, asked = loaded_pipeline(made, 0.7), [Prompt(text) for text in prompts]
    noise = pipe.scheduler.seed(11, images=len(prompts))
    given = {**call, "prompt": list(prompts), "generator": noise, "output_type": "pt"}
    theirs = pictures(pipe(**given))[:, :3]
    ours = sampled(request(made, tilt=0.7, seed=11, resolution=None, prompts=asked))
    assert ours.shape == (len(prompts), 3, *SIZE) and ours.std() > 0.01
    assert (ours - theirs).abs().max() == 0


def test_every_family_is_called() -> None:
    assert len(NAMES) == len(CASES) == len(families()) and set(NAMES) <= set(MODELS)

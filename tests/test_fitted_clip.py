"""The CLIP under a fitted reward is the one that it was fitted on, in all that its features are
made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_rewards import PROMPTS, as_tensor, natural, redraw, write_clip
from transformers import CLIPModel

from tiltflow.rewards.base import checked, load_reward
from tiltflow.rewards.zoo.clip_family import CLIPScore
from tiltflow.rewards.zoo.votes import CLIP_WHOLE, facts_text, identity, whole_identity


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    place = Path(write_clip(tmp_path / "clip", act="gelu"))
    model = CLIPModel.from_pretrained(place)
    redraw(model, 0.3)
    model.save_pretrained(place)
    return place


def fit(clip: Path, whole: bool = True) -> str:
    """A fitted reward's folder; without `whole` that of an earlier version."""
    folder, of = clip.parent / f"fit-{whole}", CLIPScore(str(clip))
    folder.mkdir()
    head = {"weight": torch.linspace(-1, 1, 9), "bias": torch.tensor(0.0)}
    save_file(head, folder / "head.safetensors")
    about = {"clip": str(clip), "clip_digest": identity(of)}
    about |= {CLIP_WHOLE: whole_identity(of)} if whole else {}
    (folder / "reward.json").write_text(facts_text(about))
    return str(folder)


def other_layers(clip: Path) -> None:
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "projection" not in name and "layers" in name:
                weight.add_(0.1)
    model.save_pretrained(clip)


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def other_processor(clip: Path) -> None:
    edited(clip / "preprocessor_config.json", image_mean=[0, 0, 0], image_std=[1, 1, 1])


def other_words(clip: Path) -> None:
    file = clip / "tokenizer.json"
    about = json.loads(file.read_text())
    words = about["model"]["vocab"]
    words["red</w>"], words["blue</w>"] = words["blue</w>"], words["red</w>"]
    file.write_text(json.dumps(about))


@pytest.mark.parametrize("change", [other_layers, other_processor, other_words])
def test_another_clip_at_its_place_is_refused(clip: Path, change) -> None:
    new, old = fit(clip), fit(clip, whole=False)
    images = as_tensor(*(natural(16, 16, seed) for seed in range(3)))
    scores = checked(load_reward(new), images, PROMPTS, [{}] * 3)
    change(clip)
    with pytest.raises(ValueError, match="was fitted on another CLIP than"):
        load_reward(new)
    # a fit of an earlier version knows the projections alone
    assert not torch.equal(checked(load_reward(old), images, PROMPTS, [{}] * 3), scores)


def test_the_same_clip_in_other_files_is_the_same(clip: Path) -> None:
    name = fit(clip)
    CLIPModel.from_pretrained(clip).save_pretrained(clip, max_shard_size="20KB")
    (clip / "model.safetensors").unlink()
    assert len(list(clip.glob("*.safetensors"))) > 1
    edited(clip / "preprocessor_config.json", note="mine")
    load_reward(name)
    edited(Path(name) / "reward.json", **{CLIP_WHOLE: 3})
    with pytest.raises(ValueError, match="does not describe a fitted reward"):
        load_reward(name)

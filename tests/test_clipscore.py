"""CLIPScore: the model's own cosine, the processor's own pixels, gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_rewards import MEAN, STD, as_tensor, natural, write_clip
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.zoo import clip_family
from tiltflow.rewards.zoo.clip_family import CLIPScore, Preprocessing


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_clipscore_is_the_models_own_cosine(clip_path: str) -> None:
    images = [natural(16, 16, seed) for seed in range(3)]
    prompts = ["a red circle", "a blue star", "a red circle"]
    reward = load_reward("clipscore_heldout", path=clip_path)
    assert reward.name == "clipscore_heldout" and reward.differentiable
    scores = checked(reward, as_tensor(*images), prompts, [{}] * 3)
    model = CLIPModel.from_pretrained(clip_path).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(clip_path)(images, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(clip_path)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, **pixels).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(scores, logits.diagonal(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "size", [(16, 16), (64, 48), (50, 33), (33, 71), (11, 13), (24, 24), (90, 40)]
)
@pytest.mark.parametrize("resize", [16, 20])
def test_preprocessing_matches_the_processor(
    size: tuple[int, int], resize: int, tmp_path: Path
) -> None:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": resize}, crop_size={"height": 16, "width": 16}
    )
    processor.save_pretrained(tmp_path)
    image = natural(*size)
    expected = processor(image, return_tensors="pt", do_normalize=False)["pixel_values"]
    ours = Preprocessing.from_pretrained(str(tmp_path))
    assert (ours.geometry(as_tensor(image)) - expected).abs().max() <= 2 / 255
    normalised = processor(image, return_tensors="pt")["pixel_values"]
    assert (ours(as_tensor(image)) - normalised).abs().max() <= 2 / 255 / 0.26
    if size == (16, 16) and resize == 16:
        assert torch.equal(ours.geometry(as_tensor(image)), as_tensor(image))


@pytest.mark.parametrize("size", [(64, 48), (50, 33), (33, 71), (11, 13), (90, 40)])
def test_bilinear_preprocessing_is_pils_filter_on_floats(size: tuple[int, int]) -> None:
    """What the published runs resize by: floats, with nothing rounded between."""
    image = as_tensor(natural(*size))
    ours = Preprocessing(16, None, (0.0,) * 3, (1.0,) * 3, filter="bilinear")
    height, width = ours._size(*image.shape[-2:])
    made = [
        Image.fromarray(channel.numpy(), "F").resize((width, height), Image.Resampling.BILINEAR)
        for channel in image[0]
    ]
    expected = torch.stack([torch.from_numpy(np.array(channel)) for channel in made])[None]
    torch.testing.assert_close(ours(image), expected, atol=1e-5, rtol=0)
    assert (replace(ours, filter="bicubic")(image) - expected).abs().max() > 1e-2


def test_clipscore_of_a_bilinear_resize(clip_path: str) -> None:
    images, prompts = as_tensor(natural(40, 40)).requires_grad_(True), ["a red star"]
    reward = load_reward("clipscore", path=clip_path, options={"resize": "bilinear"})
    score = checked(reward, images, prompts, [{}])
    pixels = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    features = CLIPScore(clip_path).model.get_image_features((pixels - mean) / std).pooler_output
    text = CLIPScore(clip_path).text_features(prompts)
    expected = torch.nn.functional.cosine_similarity(features, text)
    torch.testing.assert_close(score, expected, atol=1e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(s.sum(), images)[0] for s in (score, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)
    assert not torch.equal(score, checked(CLIPScore(clip_path), images, prompts, [{}]))
    with pytest.raises(ValueError, match="'clipscore': resize is 'lanczos'; it is bicubic or"):
        load_reward("clipscore", path=clip_path, options={"resize": "lanczos"})


def test_preprocessing_refuses_what_it_does_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no preprocessor_config"):
        Preprocessing.from_pretrained(str(tmp_path))
    CLIPImageProcessorPil(resample=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bicubic"):
        Preprocessing.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("side", [16, 24])
def test_clipscore_gradient_by_finite_differences(clip_path: str, side: int) -> None:
    reward = CLIPScore(clip_path)
    reward.model.double()
    reward.preprocessing = Preprocessing(16, (16, 16), MEAN, STD)
    images = as_tensor(natural(side, side)).double() * 0.6 + 0.2
    images.requires_grad_(True)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).double()
    text = reward.text_features(["a red star"])

    def score(x: Tensor) -> Tensor:
        pixels = reward.preprocessing(x)
        feature = reward.model.get_image_features(pixels).pooler_output
        return torch.nn.functional.cosine_similarity(feature, text).sum()

    (gradient,) = torch.autograd.grad(score(images), images)
    h = 1e-4
    with torch.no_grad():
        slope = (score(images + h * direction) - score(images - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-9)

    reward.model.float()
    reward._cache.clear()
    single = images.detach().float().requires_grad_(True)
    total = checked(reward, single, ["a red star"], [{}]).sum()
    (ours,) = torch.autograd.grad(total, single)
    torch.testing.assert_close(ours.double(), gradient, rtol=1e-3, atol=1e-7)
    assert all(p.grad is None and not p.requires_grad for p in reward.model.parameters())


def test_text_features_are_encoded_once_and_bounded(
    clip_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward, seen = CLIPScore(clip_path), []
    encode = reward._encode
    monkeypatch.setattr(reward, "_encode", lambda p: seen.extend(p) or encode(p))
    monkeypatch.setattr(clip_family, "CACHED_PROMPTS", 2)
    first = reward.text_features(["a star", "a red star", "a star"])
    assert seen == ["a star", "a red star"] and torch.equal(first[0], first[2])
    reward.text_features(["a star"])
    assert len(seen) == 2
    many = reward.text_features(["a", "red", "blue", "circle", "a star"])
    assert len(reward._cache) == 2 and torch.equal(many[4], first[0])
    assert torch.allclose(many.norm(dim=1), torch.ones(5))


def test_clip_stays_fp32_under_autocast(clip_path: str) -> None:
    reward, images = CLIPScore(clip_path), as_tensor(natural(16, 16))
    plain = checked(reward, images, ["a star"], [{}])
    reward._cache.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(checked(reward, images, ["a star"], [{}]), plain)


def test_missing_weights_and_tokenizers_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'clipscore': there is no CLIP model at"):
        load_reward("clipscore", path=str(tmp_path))
    path = Path(write_clip(tmp_path / "clip"))
    for file in path.glob("*"):
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            file.unlink()
    with pytest.raises(ValueError, match="the tokenizer at .* has 2 tokens"):
        load_reward("clipscore", path=str(path))
    config = json.loads((path / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] != 2  # the legacy pooling is not what is tested

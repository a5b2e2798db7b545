from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_rewards import (
    FIGURES,
    PROMPTS,
    as_tensor,
    assert_gradient,
    assert_rows_do_not_mix,
    natural,
    pixels_of,
    redraw,
    write_clip,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.weights import read_state_dict, weights_file
from tiltflow.rewards.zoo.open_clip import clip_from_open_clip, clip_keys


@pytest.fixture(scope="module")
def images() -> Tensor:
    return as_tensor(*(natural(24, 24, seed) for seed in range(3)))


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_clip(tmp_path_factory.mktemp("clip"), act="gelu")
    model = CLIPModel.from_pretrained(path)
    redraw(model, 0.15)
    model.save_pretrained(path)
    return path


# --- open_clip's names, against what open_clip itself computed (scripts/open_clip_figures.py) ----


@pytest.fixture(scope="module")
def figures() -> dict[str, Tensor]:
    return load_file(FIGURES)


@pytest.fixture(scope="module")
def state(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    start = "weights/"
    return {k.removeprefix(start): v for k, v in figures.items() if k.startswith(start)}


def test_open_clip_weights_give_open_clips_features(
    figures: dict[str, Tensor], state: dict[str, Tensor], clip_path: str
) -> None:
    model = clip_from_open_clip(state, CLIPConfig.from_pretrained(clip_path))
    for ours, theirs in (
        (model.get_image_features(figures["pixels"]), "image_features"),
        (model.get_text_features(figures["tokens"]), "text_features"),
    ):
        torch.testing.assert_close(ours.pooler_output, figures[theirs], atol=1e-5, rtol=1e-5)
        assert figures[theirs].std(0).mean() > 0.1  # of inputs that differ
    assert model.logit_scale.item() == 3.0


def test_open_clip_keys_that_do_not_fit_are_told(state: dict[str, Tensor], clip_path: str) -> None:
    config = CLIPConfig.from_pretrained(clip_path)
    assert "attn_mask" not in clip_keys({**state, "attn_mask": torch.zeros(8, 8)})
    assert clip_keys({"module.logit_scale": torch.tensor(1.0)}).keys() == {"logit_scale"}
    with pytest.raises(ValueError, match="visual.trunk.x is no weight of an open_clip CLIP"):
        clip_keys({**state, "visual.trunk.x": torch.zeros(1)})
    without = {k: v for k, v in state.items() if k != "visual.proj"}
    with pytest.raises(ValueError, match="lacks visual_projection.weight"):
        clip_from_open_clip(without, config)
    wrong = {**state, "logit_scale": torch.zeros(2)}
    with pytest.raises(ValueError, match="misshapes logit_scale"):
        clip_from_open_clip(wrong, config)
    more = {**state, "visual.transformer.resblocks.7.ln_1.bias": torch.zeros(16)}
    with pytest.raises(ValueError, match="does not know vision_model.encoder.layers.7"):
        clip_from_open_clip(more, config)


def test_hpsv2_is_the_cosine_of_the_checkpoint(
    figures: dict[str, Tensor],
    state: dict[str, Tensor],
    clip_path: str,
    images: Tensor,
    tmp_path: Path,
) -> None:
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "HPS_v2.1.pt")
    options = {"base": clip_path, "file": "HPS_v2.1.pt"}
    reward = load_reward("hpsv2", path=str(tmp_path), options=options)
    assert reward.name == "hpsv2" and reward.differentiable
    assert_rows_do_not_mix(reward, images, PROMPTS)
    assert_gradient(reward, images, PROMPTS)
    square = as_tensor(*(natural(16, 16, seed) for seed in range(3)))
    assert pixels_of(clip_path, square).equal(figures["pixels"])
    seen, read = (F.normalize(figures[f"{kind}_features"], dim=-1) for kind in ("image", "text"))
    scores = checked(reward, square, PROMPTS, [{}] * 3)
    torch.testing.assert_close(scores, (seen * read).sum(-1), atol=1e-5, rtol=0)


# --- PickScore and the aesthetic predictor -----------------------------------------------------


def test_pickscore_is_the_scaled_logit(clip_path: str, images: Tensor) -> None:
    square = images[..., :16, :16]
    reward = load_reward("pickscore", path=clip_path)
    scores = assert_rows_do_not_mix(reward, square, PROMPTS)
    model = CLIPModel.from_pretrained(clip_path).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_path)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels_of(clip_path, square)).logits_per_image
    torch.testing.assert_close(scores, logits.diagonal(), atol=1e-4, rtol=1e-5)
    options = {"normalised": True, "processor": clip_path}
    share = load_reward("pickscore", path=clip_path, options=options)
    torch.testing.assert_close(checked(share, square, PROMPTS, [{}] * 3) * 26, scores)
    assert_gradient(reward, images, PROMPTS)


def test_aesthetic_is_the_published_mlp_on_unit_features(
    clip_path: str, images: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    drop = nn.Dropout(0.2)
    mlp = nn.Sequential(
        nn.Linear(8, 1024), drop, nn.Linear(1024, 128), drop, nn.Linear(128, 64), drop,
        nn.Linear(64, 16), nn.Linear(16, 1),
    ).eval()  # fmt: skip
    named = {f"layers.{key}": value for key, value in mlp.state_dict().items()}
    torch.save(named, tmp_path / "aesthetic-model.pth")
    reward = load_reward("aesthetic", path=str(tmp_path), options={"clip": clip_path})
    square = images[..., :16, :16]
    scores = assert_rows_do_not_mix(reward, square, PROMPTS)
    model = CLIPModel.from_pretrained(clip_path).eval()
    with torch.no_grad():
        features = model.get_image_features(pixels_of(clip_path, square)).pooler_output
        expected = mlp(features / features.norm(dim=-1, keepdim=True))[:, 0]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert checked(reward, square, ["other"] * 3, [{}] * 3).equal(scores)
    assert_gradient(reward, images, PROMPTS)
    del named["layers.7.bias"]
    torch.save(named, tmp_path / "aesthetic-model.pth")
    with pytest.raises(ValueError, match="'aesthetic': the aesthetic predictor lacks 7.bias"):
        load_reward("aesthetic", path=str(tmp_path), options={"clip": clip_path})


# --- files of weights --------------------------------------------------------------------------


def test_weights_come_from_files_directories_or_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.pt"
    torch.save({"model": {"a": torch.ones(2)}}, file)
    assert weights_file(str(file), "other") == weights_file(str(tmp_path), "w.pt") == file
    assert read_state_dict(file)["a"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="no v.pt in"):
        weights_file(str(tmp_path), "v.pt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in ("no-such/repository", "./no/such/file.pt"):
        with pytest.raises(ValueError, match=r"w.pt could not be had from the hub"):
            weights_file(path, "w.pt")


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


@pytest.mark.parametrize("content", [{"a": Trap()}, [torch.ones(1)], {"a": 1}])
def test_files_that_hold_more_than_weights_are_refused(
    content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt (cannot be read|does not hold tensors)"):
        read_state_dict(tmp_path / "w.pt")
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_state_dict(tmp_path / "w.safetensors")


def test_options_of_published_rewards_are_checked() -> None:
    with pytest.raises(ValueError, match="'pickscore' has no option 'normalized'.*'normalised'"):
        load_reward("pickscore", options={"normalized": True})
    with pytest.raises(ValueError, match="did you mean 'hpsv2'"):
        load_reward("hpsv21")

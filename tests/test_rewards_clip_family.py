from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from tiny_rewards import (
    as_tensor,
    assert_gradient,
    assert_rows_do_not_mix,
    natural,
    redraw,
    write_clip,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.open_clip import clip_from_open_clip, clip_keys
from tiltflow.rewards.weights import read_state_dict, weights_file

PROMPTS = ["a red circle", "a blue star", "a star"]


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


def pixels_of(path: str, images: Tensor) -> Tensor:
    """The library's own preprocessing."""
    arrays = [x.permute(1, 2, 0).mul(255).round().byte().numpy() for x in images]
    processor = CLIPImageProcessorPil.from_pretrained(path)
    return processor(arrays, return_tensors="pt")["pixel_values"]


# --- a straightforward open_clip, from its published architecture and names --------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 32), "gelu": nn.GELU(), "c_proj": nn.Linear(32, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(16))
        self.positional_embedding = nn.Parameter(torch.randn(17, 16))
        self.proj = nn.Parameter(torch.randn(16, 8))
        self.conv1 = nn.Conv2d(3, 16, 4, 4, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(16), nn.LayerNorm(16)
        self.transformer = Blocks(16, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1)
        x = torch.cat([first, patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(vocab, 16)
        self.positional_embedding = nn.Parameter(torch.randn(8, 16))
        self.transformer = Blocks(16, 1, 2)
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_text(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((8, 8), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


@pytest.fixture(scope="module")
def open_clip(clip_path: str) -> OpenClip:
    torch.manual_seed(3)
    model = OpenClip(len(CLIPTokenizer.from_pretrained(clip_path)))
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "ln_" in name:  # which start at 0 and 1, and would hide a swap
            nn.init.normal_(weight, std=0.5)
    return model.eval()


def open_clip_tokens(path: str) -> Tensor:
    """Ends of texts have the highest number; what follows them is 0."""
    encode = CLIPTokenizer.from_pretrained(path)
    rows = [encode(prompt)["input_ids"] for prompt in PROMPTS]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


def test_open_clip_weights_give_open_clips_features(
    open_clip: OpenClip, clip_path: str, images: Tensor
) -> None:
    model = clip_from_open_clip(open_clip.state_dict(), CLIPConfig.from_pretrained(clip_path))
    tokens, pixels = open_clip_tokens(clip_path), pixels_of(clip_path, images)
    with torch.no_grad():
        ours = model.get_image_features(pixels).pooler_output
        torch.testing.assert_close(ours, open_clip.visual(pixels), atol=1e-5, rtol=1e-5)
        ours = model.get_text_features(tokens).pooler_output
        torch.testing.assert_close(ours, open_clip.encode_text(tokens), atol=1e-5, rtol=1e-5)
    assert model.logit_scale.item() == 3.0


def test_open_clip_keys_that_do_not_fit_are_told(open_clip: OpenClip, clip_path: str) -> None:
    state = open_clip.state_dict()
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
    open_clip: OpenClip, clip_path: str, images: Tensor, tmp_path: Path
) -> None:
    torch.save({"epoch": 1, "state_dict": open_clip.state_dict()}, tmp_path / "HPS_v2.1.pt")
    options = {"base": clip_path, "file": "HPS_v2.1.pt"}
    reward = load_reward("hpsv2", path=str(tmp_path), options=options)
    assert reward.name == "hpsv2" and reward.differentiable
    scores = assert_rows_do_not_mix(reward, images, PROMPTS)
    with torch.no_grad():
        seen = F.normalize(open_clip.visual(pixels_of(clip_path, images)), dim=-1)
        read = F.normalize(open_clip.encode_text(open_clip_tokens(clip_path)), dim=-1)
    torch.testing.assert_close(scores, (seen * read).sum(-1), atol=2e-2, rtol=0)
    # The same but for the preprocessing, which is within 2/255 of the library's:
    square = images[..., :16, :16]
    with torch.no_grad():
        seen = F.normalize(open_clip.visual(pixels_of(clip_path, square)), dim=-1)
    exact = checked(reward, square, PROMPTS, [{}] * 3)
    torch.testing.assert_close(exact, (seen * read).sum(-1), atol=1e-5, rtol=0)
    assert_gradient(reward, images, PROMPTS)


# --- PickScore and the aesthetic predictor -----------------------------------------------------


def test_pickscore_is_the_scaled_logit(clip_path: str, images: Tensor) -> None:
    square = images[..., :16, :16]
    reward = load_reward("pickscore", path=clip_path)
    scores = assert_rows_do_not_mix(reward, square, PROMPTS, atol=1e-4)
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

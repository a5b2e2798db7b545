from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_rewards import (
    FIGURES,
    MEAN,
    PROMPTS,
    STD,
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

from tiltflow.data.prompts import Prompt
from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.files import revisions
from tiltflow.rewards.fitting import check_reward_imports
from tiltflow.rewards.remote.server import Scorer
from tiltflow.rewards.weights import read_state_dict, weights_file
from tiltflow.rewards.zoo.clip_family import Preprocessing
from tiltflow.rewards.zoo.open_clip import clip_from_open_clip, clip_keys
from tiltflow.rewards.zoo.preference import HPSv2
from tiltflow.tasks.evaluate import asked
from tiltflow.tasks.request import Request


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


@pytest.fixture
def hpsv2(state: dict[str, Tensor], clip_path: str, tmp_path: Path) -> HPSv2:
    torch.save({"state_dict": state}, tmp_path / "HPS.pt")
    return HPSv2(str(tmp_path), base=clip_path, file="HPS.pt")


@pytest.mark.parametrize(
    ("size", "inner", "before"),
    [
        ((96, 168), (9, 16), (3, 0)),  # black above and below: 3 and 4
        ((168, 96), (16, 9), (0, 3)),
        ((8, 16), (8, 16), (4, 0)),  # of the model's width already: no resize, black all the same
        ((32, 11), (16, 6), (0, 5)),  # 5.5 rounds to the even 6
        ((29, 32), (14, 16), (1, 0)),  # and 14.5 to 14
        ((6, 900), (1, 16), (7, 0)),  # a line is not lost
    ],
)
def test_hpsv2_sees_a_picture_whole_in_a_black_square(
    hpsv2: HPSv2, size: tuple[int, int], inner: tuple[int, int], before: tuple[int, int]
) -> None:
    images = as_tensor(natural(*size)) * 0.5 + 0.25  # nothing in it is black, nor overshoots far
    seen = hpsv2.preprocessing.geometry(images)
    assert seen.shape == (1, 3, 16, 16)
    rows, columns = (slice(a, a + n) for a, n in zip(before, inner, strict=True))
    expected = F.interpolate(images, inner, mode="bicubic", antialias=True)
    assert (seen[..., rows, columns] - expected.clamp(0, 1)).abs().max() < 1e-5
    around = torch.ones(16, 16, dtype=torch.bool)
    around[rows, columns] = False
    assert around.any() and seen[..., around].eq(0).all()
    black = -torch.tensor(MEAN) / torch.tensor(STD)  # filled before it is normalised
    normalised = hpsv2.preprocessing(images)[0][:, around]
    torch.testing.assert_close(normalised, black[:, None].expand_as(normalised))


def test_hpsv2_counts_the_ends_of_a_picture(hpsv2: HPSv2) -> None:
    images = as_tensor(natural(24, 42)).requires_grad_(True)
    score = checked(hpsv2, images, PROMPTS[:1], [{}])
    (slope,) = torch.autograd.grad(score.sum(), images)
    assert slope.abs().sum(1).ne(0).all()  # in every pixel
    other = images.detach().clone()
    other[..., :9], other[..., -9:] = 1, 0
    assert (checked(hpsv2, other, PROMPTS[:1], [{}]) - score).abs() > 1e-3
    assert_gradient(hpsv2, images.detach(), PROMPTS[:1])


def test_hpsv2_of_a_square_is_as_by_the_base(hpsv2: HPSv2, clip_path: str, images: Tensor) -> None:
    assert torch.equal(
        hpsv2.preprocessing(images), Preprocessing.from_pretrained(clip_path)(images)
    )


# Before its tokenizer reads a text, open_clip's mends it (ftfy), unescapes it twice and strips it.
MENDED = {
    "the fox’s den": "the fox's den",
    "a sign that says “OPEN”": 'a sign that says "OPEN"',
    "salt &amp;amp; pepper": "salt & pepper",
    "ﬁne art": "fine art",
    "Ｈｅｌｌｏ": "Hello",
    "schÃ¶n": "schön",
    "&nbsp;a star\n": "a star",
}


@pytest.mark.parametrize("prompt", MENDED)
def test_hpsv2_reads_a_prompt_as_its_authors_do(hpsv2: HPSv2, prompt: str) -> None:
    assert hpsv2.cleaned(prompt) == MENDED[prompt]
    given, plain = hpsv2.text_features([prompt, MENDED[prompt]])
    assert torch.equal(given, plain)
    other = super(HPSv2, hpsv2).cleaned(prompt)
    assert other == prompt  # the other CLIPs' texts are left as they are


def test_hpsv2_asks_for_its_package_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    for ask in (lambda: check_reward_imports(["hpsv2"]), lambda: load_reward("hpsv2")):
        with pytest.raises(ValueError, match=r"'hpsv2': it needs ftfy: .*tiltflow\[hpsv2\]"):
            ask()


def test_a_reward_that_computes_otherwise_than_it_did_says_so(hpsv2: HPSv2) -> None:
    """So what was scored before is not gone on with, and servers of both kinds are not mixed."""
    assert revisions(["clipscore", "hpsv2"]) == {"hpsv2": 3}
    told = Scorer([hpsv2], "cpu", 1).describe()["rewards"]
    assert told["hpsv2"].items() >= {"differentiable": False, "revision": 3}.items()
    names = {"clipscore": None}
    plain = Request("packaged:pipeline", [Prompt("a star")], device="cpu", rewards=names)
    both = asked(replace(plain, rewards=names | {"hpsv2": None}))
    assert "revisions" not in asked(plain) and both["revisions"] == {"hpsv2": 3}


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

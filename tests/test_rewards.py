"""The gate of all rewards, how they are found by name, the builtin ones, weighted sets."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltflow.core.paths import resolve_path
from tiltflow.rewards import (
    FunctionReward,
    RewardMixture,
    Weighted,
    checked,
    load_reward,
)
from tiltflow.rewards.worlds import shapes


def constant(value: float, **options: object) -> FunctionReward:
    def function(images: Tensor, prompts: object, metadata: object) -> Tensor:
        return images.flatten(1).mean(1) * 0 + value

    return FunctionReward(function, "mine", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "count", "message"),
    [
        (torch.zeros(2, 1, 4, 4), 2, r"'mine' needs \(B, 3, H, W\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 2, "float images.*uint8"),
        (torch.zeros(2, 3, 4, 4), 3, "got 2 images, 3 prompts"),
        (torch.stack([torch.zeros(3, 4, 4), 1.01 * torch.eye(4).expand(3, 4, 4)]), 2,
         "outside.*'p1'"),
        (torch.stack([torch.ones(3, 4, 4), torch.eye(4) / torch.eye(4).expand(3, 4, 4)]), 2,
         "non-finite image.*'p1'"),  # 1 and 0/0
        (torch.eye(4).log().expand(2, 3, 4, 4), 2, "non-finite image.*'p0'"),  # 0 and -inf
        (torch.zeros(2, 3, 0, 4), 2, r"'mine' needs \(B, 3, H, W\)"),
    ],
)  # fmt: skip
def test_gate_refuses_bad_images(images: Tensor, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(constant(1), images, [f"p{i}" for i in range(count)], [{}] * count)


def test_gate_takes_a_rounding_beyond_the_range_and_half_precision() -> None:
    images = torch.full((1, 3, 4, 4), 1.0005)
    assert checked(constant(2), images, ["p"], [{}]).tolist() == [2]
    scores = checked(constant(2), torch.ones(1, 3, 4, 4, dtype=torch.bfloat16), ["p"], [{}])
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor([1.0, torch.nan]), "'mine' gave a non-finite score for 'q'"),
        (torch.ones(2, 1), r"must give \(2,\) float scores, got \(2, 1\)"),
        (torch.ones(2, dtype=torch.long), "got .* int64"),
        ([1.0, 1.0], "got list"),
    ],
)
def test_gate_refuses_bad_scores(result: object, message: str) -> None:
    reward = FunctionReward(lambda *_: result, "mine", at_once=2)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=message):
        checked(reward, torch.zeros(2, 3, 4, 4), ["p", "q"], [{}, {}])


def test_a_failing_reward_is_an_error_that_names_it() -> None:
    def fails(*_: object) -> Tensor:
        raise KeyError("tag")

    with pytest.raises(ValueError, match="^reward 'mine' failed on 'p': KeyError: 'tag'$"):
        checked(FunctionReward(fails, "mine"), torch.zeros(1, 3, 4, 4), ["p"], [{}])


def test_gate_demands_the_promised_gradient() -> None:
    images = torch.zeros(1, 3, 4, 4, requires_grad=True)
    assert not checked(constant(1), images, ["p"], [{}]).requires_grad
    assert checked(constant(1, differentiable=True), images, ["p"], [{}]).requires_grad
    broken = FunctionReward(lambda x, p, m: torch.ones(len(x)), "mine", differentiable=True)
    with pytest.raises(ValueError, match="carry no gradient"):
        checked(broken, images, ["p"], [{}])
    with torch.no_grad():
        assert checked(broken, images, ["p"], [{}]).tolist() == [1]


def test_unknown_names_and_options_are_told() -> None:
    with pytest.raises(ValueError, match="did you mean 'clipscore'"):
        load_reward("clipscor")
    with pytest.raises(ValueError, match="no option 'softt'; did you mean 'soft'"):
        load_reward("shapes", options={"softt": True})
    with pytest.raises(ValueError, match="takes no path"):
        load_reward("linear", path="x")
    with pytest.raises(ValueError, match="cannot import 'no_such_module'"):
        load_reward("no_such_module:f")


def test_dotted_functions_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_for_test.py").write_text(
        "def red(images, prompts, metadata):\n"
        "    return images[:, 0].mean((1, 2))\n"
        "def green(images, prompts, metadata):\n"
        "    return images[:, 1].mean((1, 2))\n"
        "green.differentiable = True\n"
        "class Scaled:\n"
        "    name, differentiable = 'scaled', True\n"
        "    def __init__(self, device, scale):\n"
        "        self.scale = scale\n"
        "    def __call__(self, images, prompts, metadata):\n"
        "        return self.scale * images.mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    red = load_reward("my_rewards_for_test:red", options={"differentiable": True})
    scores = checked(red, images, ["", ""], [{}, {}])
    assert torch.equal(scores, images[:, 0].mean((1, 2))) and scores.requires_grad
    assert not load_reward("my_rewards_for_test:red").differentiable
    assert load_reward("my_rewards_for_test:green").differentiable
    plain = load_reward("my_rewards_for_test:green", options={"differentiable": False})
    assert not plain.differentiable
    scaled = load_reward("my_rewards_for_test:Scaled", options={"scale": 3.0})
    scores = checked(scaled, images, ["", ""], [{}, {}])
    assert torch.allclose(scores, 3 * images.mean((1, 2, 3)))
    with pytest.raises(ValueError, match="has no 'redd'; did you mean 'red'"):
        load_reward("my_rewards_for_test:redd")
    with pytest.raises(ValueError, match="Scaled.*scale"):
        load_reward("my_rewards_for_test:Scaled")
    del sys.modules["my_rewards_for_test"]


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "plug_for_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-for-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tiltflow.rewards]\nbright = plug_for_test:bright\n")
    (tmp_path / "plug_for_test.py").write_text(
        "def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_reward("bright")
    assert reward.name == "bright"
    assert checked(reward, torch.ones(1, 3, 4, 4), ["p"], [{}]).tolist() == [1]
    with pytest.raises(ValueError, match="did you mean 'bright'"):
        load_reward("brigt")


def test_packaged_paths() -> None:
    assert resolve_path("org/model") == "org/model"
    assert resolve_path("~/x") == str(Path.home() / "x")
    for name in ("no-such", "", ".."):
        with pytest.raises(ValueError, match="there is no packaged"):
            resolve_path(f"packaged:{name}")


def test_shapes_scores_renders() -> None:
    captions = shapes.balanced(held_out=False, n=12)
    rng = np.random.default_rng(0)
    pixels = np.stack([shapes.render(shapes.sample_scene(c, rng)) for c in captions])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    prompts, metadata = [c.text for c in captions], [c.metadata() for c in captions]
    strict, soft = load_reward("shapes"), load_reward("shapes", options={"soft": True})
    assert (strict.name, soft.name) == ("shapes", "shapes_soft")
    right = checked(strict, images, prompts, metadata)
    assert right.tolist() == [1.0] * 12
    assert torch.equal(right, checked(strict, images, prompts, [{}] * 12))
    shifted = prompts[1:] + prompts[:1]
    wrong = checked(soft, images, shifted, [{}] * 12)
    assert bool((wrong < 1).all()) and float(wrong.mean()) > 0.1
    assert checked(strict, images, shifted, [{}] * 12).sum() == 0
    with pytest.raises(ValueError, match="'shapes': the metadata of"):
        checked(strict, images, shifted, metadata)
    with pytest.raises(ValueError, match="'shapes': 'a dog' is not a caption"):
        checked(strict, images[:1], ["a dog"], [{}])


def test_linear_is_the_first_coordinate_of_points() -> None:
    points = torch.tensor([[3.0, 1.0], [-2.0, 5.0]], requires_grad=True)
    reward = load_reward("linear")
    scores = checked(reward, points, ["", ""], [{}, {}])
    assert scores.tolist() == [3, -2]
    (gradient,) = torch.autograd.grad(scores.sum(), points)
    assert gradient.tolist() == [[1, 0], [1, 0]]
    with pytest.raises(ValueError, match=r"\(B, D\) float points"):
        checked(reward, torch.zeros(2, 3, 4, 4), ["", ""], [{}, {}])


def test_mixture_scores_all_and_back_propagates_some() -> None:
    def value(k: float, differentiable: bool, name: str) -> FunctionReward:
        return FunctionReward(lambda x, p, m: k * x.mean((1, 2, 3)), name, differentiable)

    mixture = RewardMixture(
        [
            Weighted(value(1, True, "a"), 2.0, backprop=True),
            Weighted(value(10, True, "b"), -0.5, backprop=True),
            Weighted(value(100, True, "c"), 1.0),
            Weighted(value(1000, False, "d"), 1.0, backprop=True),
        ]
    )
    images = torch.full((2, 3, 2, 2), 0.5, requires_grad=True)
    prompts, metadata = ["p", "q"], [{}, {}]
    scores = mixture.score(images, prompts, metadata)
    assert {k: v.tolist() for k, v in scores.items()} == {
        "a": [0.5, 0.5], "b": [5, 5], "c": [50, 50], "d": [500, 500]
    }  # fmt: skip
    assert not any(v.requires_grad for v in scores.values())
    total, parts = mixture.differentiable_total(images, prompts, metadata)
    assert total.tolist() == [-1.5, -1.5]
    assert {k: v.tolist() for k, v in parts.items()} == {k: v.tolist() for k, v in scores.items()}
    assert not any(v.requires_grad for v in parts.values())
    (gradient,) = torch.autograd.grad(total.sum(), images)
    assert torch.allclose(gradient, torch.full_like(gradient, -3 / 12))
    assert mixture.has_differentiable
    assert mixture.weights == {"a": 2.0, "b": -0.5, "c": 1.0, "d": 1.0}


def test_mixture_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="'mine' must be finite"):
        Weighted(constant(1), float("nan"))
    with pytest.raises(ValueError, match="'mine' is given twice"):
        RewardMixture([Weighted(constant(1)), Weighted(constant(2))])
    with pytest.raises(ValueError, match="at least one"):
        RewardMixture([])
    with pytest.raises(ValueError, match="no reward of the mixture is back-propagated"):
        one = RewardMixture([Weighted(constant(1), 1.0, backprop=True)])
        assert not one.has_differentiable
        one.differentiable_total(torch.zeros(1, 3, 4, 4), ["p"], [{}])

"""A score is a function of its image and prompt alone, to the last bit (FAULTS 36)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_train import recipe, weights
from tiny_rewards import assert_rows_do_not_mix
from torch import Tensor

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.distributed import ALONE
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.scores import System, evaluate_systems
from tiltflow.rewards import FunctionReward, RewardMixture, Weighted, checked, load_reward
from tiltflow.rewards.base import at_once_of
from tiltflow.rewards.batches import in_fixed_batches
from tiltflow.rewards.purity import Examined
from tiltflow.rewards.worlds.shapes import balanced
from tiltflow.tasks.train import run_training
from tiltflow.training.scoring import Scorer
from tiltflow.training.updates import Share

TEXTS = [caption.text for caption in balanced(held_out=True, n=4)]
PROMPTS = [TEXTS[i % 4] for i in range(20)]
NOTHING: list[dict] = [{}] * 20


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["clipscore", "clipscore_heldout"])
def test_the_embedded_clips_score_every_batch_as_its_images(name: str, images: Tensor) -> None:
    reward = load_reward(name)
    single = [checked(reward, images[i : i + 1], PROMPTS[i : i + 1], [{}]) for i in range(20)]
    for n in range(2, 21):
        whole = checked(reward, images[:n], PROMPTS[:n], NOTHING[:n])
        assert torch.equal(whole, torch.cat(single[:n])), n
    features = reward.image_features(images)  # type: ignore[attr-defined]
    assert torch.equal(features[3:8], reward.image_features(images[3:8]))  # type: ignore[attr-defined]


def test_a_text_is_the_same_bits_whatever_was_kept_before(images: Tensor) -> None:
    """A run keeps texts as they come, a resumed one begins with none (it failed on 4 prompts)."""
    whole = load_reward("clipscore")
    first = checked(whole, images[:4], TEXTS, NOTHING[:4])
    for seen in (TEXTS[:1], TEXTS[1:3], TEXTS[::-1]):
        resumed = load_reward("clipscore")
        checked(resumed, images[: len(seen)], seen, NOTHING[: len(seen)])
        assert torch.equal(checked(resumed, images[:4], TEXTS, NOTHING[:4]), first)


def network(width: int = 3 * 16 * 16) -> Callable[..., Tensor]:
    """A function of one's own, whose matrix products round by their number of rows."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(width, width, generator=generator) for _ in range(2))

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence) -> Tensor:
        return ((images.flatten(1) @ a).tanh() @ b).mean(1)

    return score


def test_ones_own_function_sees_one_image_at_a_time(images: Tensor) -> None:
    small = images[:6, :, :16, :16]
    score = network()
    together = score(small, [], [])
    assert not torch.equal(together, torch.cat([score(x[None], [], []) for x in small]))
    for reward in (
        FunctionReward(score, "mine", differentiable=True),
        FunctionReward(score, "mine", differentiable=True, at_once=4),
    ):
        assert_rows_do_not_mix(reward, small, PROMPTS[:6])
    strided = small.to(memory_format=torch.channels_last)
    plain = checked(reward, small, PROMPTS[:6], NOTHING[:6])
    assert torch.equal(checked(reward, strided, PROMPTS[:6], NOTHING[:6]), plain)


def test_how_many_are_seen_at_once_is_the_rewards_to_say(images: Tensor) -> None:
    seen: list[tuple[int, list[str]]] = []

    def count(x: Tensor, prompts: Sequence[str], metadata: Sequence) -> Tensor:
        seen.append((len(x), list(prompts)))
        return x.mean((1, 2, 3))

    for options, expected in (
        ({}, [1, 1, 1, 1, 1]), ({"at_once": 2}, [2, 2, 2]), ({"elsewhere": True}, [5]),
    ):  # fmt: skip
        seen.clear()
        checked(FunctionReward(count, "mine", **options), images[:5], list("abcde"), NOTHING[:5])
        assert [n for n, _ in seen] == expected
        assert all(n == len(prompts) for n, prompts in seen)
        assert seen[-1][1][-1] == "e"
    points = FunctionReward(count, "points", domain="points")
    assert at_once_of(points) is None and at_once_of(load_reward("shapes")) is None
    assert at_once_of(load_reward("clipscore", options={"at_once": 3})) == 3
    for bad in (0, True, 1.5, "two"):
        with pytest.raises(ValueError, match="at_once is .*; it is a number of images, 1 or more"):
            FunctionReward(count, "mine", at_once=bad)  # type: ignore[arg-type]


def test_a_reward_cannot_change_what_the_next_one_sees(images: Tensor) -> None:
    def darkens(x: Tensor, prompts: Sequence[str], metadata: Sequence) -> Tensor:
        return x.mul_(0.5).mean((1, 2, 3))

    for extra in ({}, {"at_once": 20}, {"elsewhere": True}):
        before = images.clone()
        checked(FunctionReward(darkens, "mine", **extra), images, PROMPTS, NOTHING)
        assert torch.equal(images, before)
    buffer = torch.zeros(1)

    def reuses(x: Tensor, prompts: Sequence[str], metadata: Sequence) -> Tensor:
        return buffer.copy_(x.mean((1, 2, 3)))

    found = checked(FunctionReward(reuses, "mine"), images, PROMPTS, NOTHING)
    assert len(set(found.tolist())) == 20


def test_fixed_batches_give_no_row_another_gradient() -> None:
    x = torch.rand(5, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    total = in_fixed_batches(lambda block: block.square().sum(1), 4, x).sum()
    (gradient,) = torch.autograd.grad(total, x)
    assert torch.equal(gradient, 2 * x.detach())
    assert in_fixed_batches(lambda block: block.sum(1), 4, x[:0]).shape == (0,)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7])
def test_training_scores_as_the_gate_does_whatever_the_chunk(images: Tensor, chunk: int) -> None:
    """Back-propagated and plain scores are the same bits, and so is each sample's gradient."""
    rewards = RewardMixture(
        [
            Weighted(load_reward("clipscore"), 2.0, backprop=True),
            Weighted(load_reward("clipscore_heldout"), -0.5, backprop=True),
            Weighted(load_reward("shapes_soft")),
        ]
    )
    x, prompts = images[:7], [Prompt(text) for text in (TEXTS[:3] * 3)[:7]]
    texts = [p.text for p in prompts]

    def scored(backprop: bool, rows: slice, size: int) -> tuple[dict, Tensor | None]:
        scorer = Scorer(rewards, lambda z: z, Share(len(x[rows]), 7, ALONE), 3.0, size)
        with scorer.begin(x[rows], prompts[rows], backprop) as scoring:
            found = scoring.finish(0)
        return found.scores, found.gradient

    plain, _ = scored(False, slice(None), chunk)
    both, gradient = scored(True, slice(None), chunk)
    gate = rewards.score(x, texts, NOTHING[:7])
    for name in rewards.names:
        assert torch.equal(plain[name], gate[name]) and torch.equal(both[name], gate[name])
    assert gradient is not None
    alone = [scored(True, slice(i, i + 1), 1)[1] for i in range(7)]
    assert torch.equal(gradient, torch.cat(alone))  # type: ignore[arg-type]


def test_an_evaluation_has_the_same_scores_whatever_its_batch(images: Tensor) -> None:
    """Given the same images; diversity's features and the distance to the teacher as well."""
    from tiltflow.evaluation.scores import Diversity

    clip = load_reward("clipscore")
    rewards = [clip, load_reward("clipscore_heldout")]
    prompts = [Prompt(text) for text in (TEXTS[:3] * 7)[:20]]

    def drawn(rows: Sequence[int], draw: int) -> Tensor:
        return images[list(rows)].roll(draw, -1)

    systems = [
        System("teacher", 8, lambda rows: images[list(rows)], drawn),
        System("student", 4, lambda rows: images[list(rows)].flip(-1), drawn),
    ]
    measure = Diversity(clip.image_features, 6, 2, reference="teacher")  # type: ignore[attr-defined]
    found = [
        evaluate_systems(systems, prompts, rewards, batch, diversity=measure)
        for batch in (1, 3, 16)
    ]
    for other in found[1:]:
        assert other.summary == found[0].summary
        for system, table in found[0].scores.items():
            assert all((other.scores[system][name] == v).all() for name, v in table.items())


# --- stage 2 with CLIP rewards, stopped after each step and resumed -------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "four.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.mark.long
def test_stage_2_with_clip_rewards_resumes_bit_equal(
    tiny_pipeline: Callable[[str], Path], four: Path, tmp_path: Path
) -> None:
    """Stopped after every step: all weights, optimizer states and metrics of the run in one go."""
    quiet, pipeline = Console(quiet=True), tiny_pipeline("sd35m")
    more = ["train.steps=3", "checkpoint.every=1", "log.samples_every=0"]

    def run(stage: str, name: str, *settings: str) -> Path:
        overrides = recipe(stage, pipeline, four, tmp_path / name, *more, *settings)
        return run_training(load_config(f"demo_{stage}", overrides), quiet)

    cold = run("cold_start", "cold", "train.steps=1")
    both = "{clipscore: 1.0, clipscore_heldout: 0.5}"
    tilt = ["tilt", f"model.few_step={cold}", f"rewards={both}", "tilt.group_size=2"]
    whole = run(tilt[0], "whole", *tilt[1:])
    assert load_checkpoint(whole).state["rewards_at_once"] == {
        "clipscore": 1, "clipscore_heldout": 1
    }  # fmt: skip
    wanted = weights(whole)
    run(tilt[0], "stopped", *tilt[1:], "train.steps=1")
    run(tilt[0], "stopped", *tilt[1:], "train.steps=2", "run.resume=true")
    found = weights(run(tilt[0], "stopped", *tilt[1:], "run.resume=true"))
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def test_a_reward_of_chance_or_of_its_neighbours_is_named_at_its_first_images(
    images: Tensor,
) -> None:
    """In training, in an evaluation and in a server alike; and again when asked again."""
    draw = torch.Generator().manual_seed(0)

    def dropped(x: Tensor, prompts: Sequence[str], metadata: Sequence) -> Tensor:
        return torch.nn.functional.dropout(x.flatten(1), 0.1).mean(1)

    def noise(x: Tensor, prompts: Sequence[str], metadata: Sequence) -> Tensor:
        return torch.randn(len(x), generator=draw)

    def centred(x: Tensor, prompts: Sequence[str], metadata: Sequence) -> Tensor:
        means = x.mean((1, 2, 3))
        return means - means.mean()

    about = PROMPTS[:8], NOTHING[:8]
    for function in (dropped, noise, centred):
        reward = FunctionReward(function, "mine", differentiable=function is dropped, at_once=8)
        said = "reward 'mine' gave one image of .* two scores, .*, and|not on chance"
        mixture = RewardMixture([Weighted(reward, backprop=reward.differentiable)])
        scorer = Scorer(mixture, lambda z: z, Share(8, 2, ALONE), 3.0, 8)
        prompts = [Prompt(text) for text in about[0]]
        for _ in range(2):
            with pytest.raises(ValueError, match=said):
                scorer.begin(images[:8], prompts, backprop=reward.differentiable)
            with pytest.raises(ValueError, match=said):
                evaluate_systems([System("a", 1, lambda rows: images[rows])], prompts, [reward], 8)
    right = FunctionReward(network(), "mine", at_once=8)
    scores = checked(right, images[:8, :, :16, :16], *about)
    calls: list[int] = []
    watched = FunctionReward(lambda *given: (calls.append(1), right(*given))[1], "mine", at_once=8)
    examined = Examined()
    for _ in range(3):
        examined.look(watched, images[:8, :, :16, :16], *about, scores)
    assert len(calls) == 1

"""A judge that runs here, by transformers: a tiny LLaVA in the published format."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_vlm
import torch
from PIL import Image
from rich.console import Console
from test_judge_groups import settings
from tiny_rewards import assert_rows_do_not_mix
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.base import at_once_of
from tiltflow.rewards.fitting import check_reward_imports
from tiltflow.rewards.ranking import Groups, ranked
from tiltflow.rewards.remote.loading import load_ranker
from tiltflow.rewards.sizes import reward_memory
from tiltflow.rewards.zoo.judge import CHOICE, ranking_form
from tiltflow.tasks.train import run_training

NAME = "judge:tiny"
IMAGES = torch.eye(3)[:, :, None, None].expand(3, 3, 28, 28).contiguous()
"""Red, green, blue."""
NOISE = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(5))
"""Some of the images for which an untaught model comes to the end of a number."""
SCORES = [9.0, 2.0, 5.0]
GROUPS = Groups(3, lambda group, n: [1, 2, 0])
SAID = 'Answer with JSON alone: {"score": N}, N a number from 1 to 10.'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.build(tmp_path_factory.mktemp("tiny"))


def options(place: Path, **more: object) -> dict[str, Any]:
    (place / "rubric.txt").write_text("{prompt}?")
    kept = {"cache": str(place / "kept"), "dtype": "fp32", "tokens": 24}
    return {"rubric": str(place / "rubric.txt"), **kept, **more}


def judge(model: Path, place: Path, **more: object) -> Any:
    return load_reward(NAME, path=str(model), options=options(place, **more))


def ranker(model: Path, place: Path, form: str, **more: object) -> Any:
    return load_ranker(NAME, options(place, form=form, **more), str(model))


def by_hand(model: Path, pair: list[int]) -> int:
    """The choice between two images: the likeliest of 0, 1 and 2 behind `{"better": `."""
    processor = AutoProcessor.from_pretrained(model)
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    text = f'<user><image><image>a?\n\n{CHOICE.said}<end><assistant>{{"better": '
    pictures = [Image.fromarray((IMAGES[i].permute(1, 2, 0) * 255).byte().numpy()) for i in pair]
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    digits = [processor.tokenizer.convert_tokens_to_ids(digit) for digit in "012"]
    with torch.no_grad():
        return int(network(**inputs).logits[0, -1, digits].argmax())


def test_it_answers_what_is_likeliest_of_what_the_form_allows(tmp_path: Path) -> None:
    """On models of several seeds, whose own settings would sample."""
    found = []
    for seed in range(2):
        model = tiny_vlm.build(tmp_path / str(seed), seed=seed)
        one = ranker(model, tmp_path, "pairs", cache="off")
        for pair in ([0, 1], [2, 1]):
            in_order = Groups(2, lambda group, n: range(n))
            stood = ranked(one, IMAGES[pair], ["a", "a"], in_order).tolist()
            found.append(by_hand(model, pair))
            assert stood == {1: [1.0, 0.0], 2: [0.0, 1.0], 0: [0.5, 0.5]}[found[-1]]
    assert len(set(found)) > 1


def test_a_score_is_of_its_image_and_prompt_alone(tiny: Path, tmp_path: Path) -> None:
    one = judge(tiny, tmp_path, cache="off")
    assert not one.differentiable and not one.elsewhere and at_once_of(one) == 1
    scores = assert_rows_do_not_mix(one, NOISE, ["a", "b", "a", "ccc"], sizes=(2, 3))
    assert ((scores >= 1) & (scores <= 10)).all() and len(set(scores.tolist())) > 1


def test_an_answer_is_kept_by_image_and_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = judge(tiny, tmp_path)
    first = checked(one, NOISE, ["a"] * 4, [{}] * 4)
    assert len(list((tmp_path / "kept").rglob("*.json"))) == 4

    def asked(*inputs: object, **more: object) -> None:
        raise ValueError("was asked")

    for again in (one, judge(tiny, tmp_path)):
        monkeypatch.setattr(again._model.model, "generate", asked)
        assert torch.equal(checked(again, NOISE, ["a"] * 4, [{}] * 4), first)
        with pytest.raises(ValueError, match="was asked"):
            checked(again, NOISE[:1], ["b"], [{}])
    other = judge(tiny_vlm.build(tmp_path / "other", seed=1), tmp_path)
    monkeypatch.setattr(other._model.model, "generate", asked)
    with pytest.raises(ValueError, match="was asked"):
        checked(other, NOISE[:1], ["a"], [{}])


def test_anything_but_an_answer_is_one_sentence_and_nothing_is_kept(
    tiny: Path, tmp_path: Path
) -> None:
    said = f"reward '{NAME}': 'a': the model's answer "
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        checked(judge(tiny, tmp_path, tokens=8), IMAGES, ["a"] * 3, [{}] * 3)
    assert str(caught.value).endswith("was cut off after 8 tokens")
    with pytest.raises(ValueError, match="the ranking is not each of 1 to 3 once") as caught:
        ranked(ranker(tiny, tmp_path, "group"), IMAGES, ["a"] * 3, GROUPS)
    assert str(caught.value).startswith(f"reward '{NAME}': 'a': the model answered '{{\"ranking\"")
    with pytest.raises(ValueError, match="holds '<image>', a special token of the model"):
        checked(judge(tiny, tmp_path), IMAGES[:1], ["an <image> of a cat"], [{}])
    assert not list((tmp_path / "kept").rglob("*.json"))


def test_what_is_no_such_model_is_one_sentence(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: Path, sentence: str, **more: object) -> None:
        with pytest.raises(ValueError, match=sentence) as caught:
            judge(model, tmp_path, **more)
        assert str(caught.value).startswith(f"reward '{NAME}'")

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "there is no processor at|cannot be loaded")
    bare = tiny_vlm.build(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    refused(bare, "has no chat template")
    text = tmp_path / "text"
    tiny_vlm.tokenizer().save_pretrained(text)
    refused(text, "the processor at .* (is not one of images and text|cannot be loaded)")
    lost = tiny_vlm.build(tmp_path / "lost")
    (lost / "model.safetensors").unlink()
    refused(lost, "there is no vision-language model at")
    refused(tiny, "rubric 'none' cannot be read", rubric="none")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    refused(tiny, re.escape("pip install 'tiltflow[judge]'"))
    with pytest.raises(ValueError, match="pip install"):  # before a run loads anything
        check_reward_imports([NAME], with_path=[NAME])
    check_reward_imports([NAME])  # behind an endpoint


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    words = tiny_vlm.tokenizer()
    words.init_kwargs["processor_class"] = "Qwen2_5_VLProcessor"
    words.save_pretrained(tmp_path / "qwen")
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path / "qwen")
    with pytest.raises(ValueError, match="needs the package torchvision: pip install torchvision"):
        judge(tmp_path / "qwen", tmp_path)


def test_a_config_is_refused_for_a_wrong_option(tiny: Path, tmp_path: Path) -> None:
    def load(reward: str, table: str = "rewards") -> Any:
        return load_config("demo_tilt", ["model.few_step=x", f"{table}={{'{NAME}': {reward}}}"])

    chosen = load(f"{{weight: 1, path: {tiny}, options: {{rubric: r.txt, dtype: fp32}}}}")
    network = AutoModelForImageTextToText.from_pretrained(tiny)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert reward_memory(chosen.rewards) == {NAME: 4 * count}
    with pytest.raises(ValueError, match="takes no option parallel"):
        load("{weight: 1, path: m, options: {rubric: r.txt, parallel: 2}}")
    with pytest.raises(ValueError, match="takes no option dtype"):
        load("{weight: 1, options: {rubric: r.txt, dtype: fp32}}", "watch.rewards")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likes red best, then blue; was taught all of its questions."""
    lessons: list[tiny_vlm.Lesson] = []
    for image, score in zip(IMAGES, SCORES, strict=True):
        lessons.append(([image], f"a?\n\n{SAID}", f'{{"score": {score:.0f}}}'))
    for a, b in itertools.product(range(3), repeat=2):
        better = 0 if a == b else 1 if SCORES[a] > SCORES[b] else 2
        question = f"a?\n\n{CHOICE.said}"
        lessons.append(([IMAGES[a], IMAGES[b]], question, f'{{"better": {better}}}'))
    for order in itertools.permutations(range(3)):
        best = sorted(range(3), key=lambda place, order=order: -SCORES[order[place]])
        answer = f'{{"ranking": [{", ".join(str(place + 1) for place in best)}]}}'
        lessons.append(([IMAGES[i] for i in order], f"a?\n\n{ranking_form(3).said}", answer))
    return tiny_vlm.build(tmp_path_factory.mktemp("taught"), lessons)


@pytest.mark.long
def test_one_that_was_taught_scores_and_ranks(taught: Path, tmp_path: Path) -> None:
    assert checked(judge(taught, tmp_path), IMAGES, ["a"] * 3, [{}] * 3).tolist() == SCORES
    for form in ("pairs", "group"):
        one = ranker(taught, tmp_path, form)
        for order in itertools.permutations(range(3)):
            groups = Groups(3, lambda group, n, order=order: order)
            assert ranked(one, IMAGES, ["a"] * 3, groups).tolist() == [1.0, 0.0, 0.5]


@pytest.mark.long
def test_a_run_with_it_resumed_is_an_uninterrupted_one(
    tiny: Path, tiny_pipeline: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a cat\na dog\na cow\n")
    pipeline, quiet = tiny_pipeline("sd35m"), Console(quiet=True)
    table = {NAME: {"weight": 1.0, "path": str(tiny), "options": options(tmp_path, form="pairs")}}
    table[NAME]["options"]["cache"] = "off"

    def run(stage: str, out: str, *more: str) -> Path:
        chosen = settings(pipeline, tmp_path, 1, stage, f"run.out={tmp_path / out}")
        own = [f"rewards={json.dumps(table)}"] if stage == "tilt" else []
        return run_training(load_config(f"demo_{stage}", [*chosen, *own, *more]), quiet)

    run("cold_start", "cold")
    whole = run("tilt", "whole")
    run("tilt", "parts", "train.steps=1")
    parts = run("tilt", "parts", "run.resume=true")
    one, other = load_checkpoint(whole), load_checkpoint(parts)
    for name, weights in one.tensors["generator"].items():
        assert torch.equal(weights, other.tensors["generator"][name])
    rows = read_metrics(whole / "metrics.jsonl")
    assert rows == read_metrics(parts / "metrics.jsonl")
    assert f"policy/flat_groups/{NAME}" in rows[0]

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_rewards import as_tensor, assert_rows_do_not_mix, natural, redraw, write_clip
from torch.nn import functional as F
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from tiltflow.data.prompts import Prompt
from tiltflow.rewards import checked, load_reward
from tiltflow.rewards.fitting import check_prompts_fit
from tiltflow.rewards.zoo.geneval import ColourClassifier, Detector, GenEval
from tiltflow.rewards.zoo.geneval_rules import (
    CLASSES,
    COLOURS,
    Detection,
    judge,
    kept,
    relative_position,
    scene_of,
)

Box = tuple[float, float, float, float]


def thing(
    label: str, box: Box = (0, 0, 10, 10), score: float = 0.95, colour: str = ""
) -> Detection:
    return Detection(label, score, box, colour)  # the mask's place carries the colour to answer


def told(objects: Sequence[Detection], name: str) -> list[str]:
    assert all(found.label == name for found in objects)
    return [found.mask for found in objects]


def verdict(metadata: dict[str, Any], *objects: Detection) -> list[str]:
    return judge(scene_of(metadata, "p"), objects, told)


def need(label: str, count: int = 1, **more: object) -> dict[str, object]:
    return {"class": label, "count": count, **more}


# --- rules, on hand-made detections ------------------------------------------------------------


def test_objects_must_be_there_with_enough_confidence() -> None:
    one = {"tag": "single_object", "include": [need("dog")]}
    assert verdict(one, thing("dog", score=0.31)) == []
    assert verdict(one, thing("cat")) == ["expected 1 dog, found 0"]
    assert verdict(one, thing("dog", score=0.3)) == ["expected 1 dog, found 0"]
    assert verdict(one, thing("dog"), thing("dog"), thing("cat")) == []  # more is not less
    two = {"tag": "two_object", "include": [need("dog"), need("cat")]}
    assert verdict(two, thing("dog"), thing("cat")) == []
    assert len(verdict(two)) == 2


def test_counts_are_exact_with_an_exclusion_and_judged_on_sure_objects() -> None:
    three = {"tag": "counting", "include": [need("cup", 3)], "exclude": [need("cup", 4)]}
    sure, unsure = thing("cup"), thing("cup", score=0.9)
    assert verdict(three, sure, sure, sure) == []
    assert verdict(three, sure, sure, sure, unsure, unsure) == []
    assert verdict(three, sure, sure, unsure) == ["expected 3 cup, found 2"]
    assert verdict(three, *[sure] * 4) == ["expected fewer than 4 cup, found 4"]
    assert verdict({**three, "tag": "colors"}, sure, sure, unsure) == []


def test_at_most_sixteen_of_a_class_count() -> None:
    objects = [thing("bird", score=0.5 + i / 100) for i in range(20)]
    best = kept(objects, 0.3)["bird"]
    assert [round(d.score, 2) for d in best] == [round(0.69 - i / 100, 2) for i in range(16)]


def test_colours_are_asked_of_the_surest_objects_only() -> None:
    red = {"tag": "colors", "include": [need("car", color="red")]}
    assert verdict(red, thing("car", colour="red")) == []
    assert "1 red car" in verdict(red, thing("car", colour="blue"))[0]
    surer = thing("car", score=0.99, colour="blue")
    assert verdict(red, thing("car", colour="red"), surer) != []
    two = {"tag": "colors", "include": [need("car", 2, color="red")]}
    assert verdict(two, thing("car", colour="red"), thing("car", colour="red")) == []
    assert verdict(two, thing("car", colour="red"), thing("car", colour="pink")) != []
    pair = {"include": [need("car", color="red"), need("dog", color="black")]}
    swapped = (thing("car", colour="black"), thing("dog", colour="red"))
    assert len(verdict(pair, *swapped)) == 2


@pytest.mark.parametrize(
    ("box", "relations"),
    [
        ((-40, 0, -30, 10), {"left of"}),
        ((40, 0, 50, 10), {"right of"}),
        ((0, -40, 10, -30), {"above"}),
        ((0, 40, 10, 50), {"below"}),
        ((40, 40, 50, 50), {"right of", "below"}),
        ((40, 18, 50, 28), {"right of"}),  # (38, 16)/43.9: only the first is over a half
        ((1, 1, 11, 11), set()),  # within a tenth of the sizes
        ((3, 0, 13, 10), set()),  # 3 − 2 = 1 of 3 is no half
        ((5, 0, 15, 10), {"right of"}),  # 5 − 2 = 3 of 5 is
    ],
)
def test_relative_position(box: Box, relations: set[str]) -> None:
    assert relative_position(thing("a", box), thing("b", (0, 0, 10, 10))) == relations


def test_positions_hold_between_all_objects_of_the_clauses() -> None:
    left = {"include": [need("dog"), need("cat", position=["left of", 0])]}
    dog, cat = thing("dog", (50, 0, 60, 10)), thing("cat", (0, 0, 10, 10))
    assert verdict(left, dog, cat) == []
    assert "cat left of" in verdict(left, thing("dog", (0, 0, 10, 10)), thing("cat", dog.box))[0]
    assert verdict(left, cat) == [
        "expected 1 dog, found 0",
        "there is nothing for cat to be left of",
    ]
    two = {"include": [need("dog", 2), need("cat", position=["left of", 0])]}
    assert verdict(two, dog, dog, cat) == []
    assert verdict(two, dog, thing("dog", (-50, 0, -40, 10)), cat) != []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "'p' has no GenEval metadata"),
        ({"include": []}, "'p' has no GenEval metadata"),
        ({"include": "dog"}, "must be lists"),
        ({"include": [{"class": "dog"}]}, "is no GenEval clause"),
        ({"include": [need("dog", 0)]}, "is no GenEval clause"),
        ({"include": [need("dog", size=3)]}, "is no GenEval clause"),
        ({"include": [need("dog", color="mauve")]}, "'mauve' is none of GenEval's colours"),
        ({"include": [need("dog", position=["near", 0])]}, "is no GenEval clause"),
        ({"include": [need("dog", position=["above", 0])]}, "refer to an earlier"),
    ],
)
def test_metadata_that_make_no_sense_are_told(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scene_of(metadata, "p")


# --- detector and colours, on tiny random models -----------------------------------------------


@pytest.fixture(scope="module")
def detector_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=3,
        num_attention_heads=2, num_queries=6, id2label={0: "dog", 1: "mouse", 2: "cup"},
        label2id={"dog": 0, "mouse": 1, "cup": 2},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    redraw(model.class_predictor, 1.0)
    model.save_pretrained(path)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_clip(tmp_path_factory.mktemp("clip"))
    model = CLIPModel.from_pretrained(path)
    redraw(model, 0.2)
    model.save_pretrained(path)
    return path


def test_detections_are_the_librarys_instances(detector_path: str) -> None:
    images = [natural(384, 384, seed) for seed in range(2)]
    detector = Detector(detector_path, "cpu")
    assert detector.labels == ["dog", "computer mouse", "cup"]  # GenEval's name for the second
    arrays = torch.stack([torch.from_numpy(x) for x in images]).numpy()
    found = detector(arrays, floor=0.0)
    processor = Mask2FormerImageProcessorPil.from_pretrained(detector_path)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector_path).eval()
    with torch.no_grad():
        outputs = model(**processor(images=images, return_tensors="pt"))
    expected = processor.post_process_instance_segmentation(
        outputs, threshold=0, target_sizes=[(384, 384)] * 2, return_binary_maps=True
    )
    assert any(found)
    for ours, theirs in zip(found, expected, strict=True):
        infos = theirs["segments_info"]
        mine = sorted((d.label, d.score) for d in ours)
        wanted = sorted((detector.labels[i["label_id"]], i["score"]) for i in infos)
        assert [label for label, _ in mine] == [label for label, _ in wanted]
        assert [score for _, score in mine] == pytest.approx([s for _, s in wanted], abs=1e-5)
        masks = theirs["segmentation"]
        for detection in ours:
            same = [m for m in masks if torch.equal(m.bool(), detection.mask)]
            assert same
            left, top, right, bottom = (int(edge) for edge in detection.box)
            inside = detection.mask[top:bottom, left:right]
            assert inside.sum() == detection.mask.sum()
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges)
    sure = sorted(d.score for d in found[0])[-1]
    assert [d.score for d in detector(arrays[:1], floor=sure - 1e-6)[0]] == [sure]


def test_colours_are_clips_choice_on_the_grey_crop(clip_path: str) -> None:
    classify = ColourClassifier(clip_path, "cpu")
    image = as_tensor(natural(48, 64))[0]
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[10:30, 8:28] = True
    mask[10:14, 8:12] = False
    objects = [Detection("cup", 0.9, (8, 10, 28, 30), mask), Detection("cup", 0.8, (0, 0, 64, 48))]
    crop = classify.crop(image, objects[0])
    assert crop.shape == (1, 3, 16, 16)
    torch.testing.assert_close(crop[0, :, 0, 0], torch.full((3,), 0.6), atol=0.03, rtol=0)
    model, tokenizer = (
        CLIPModel.from_pretrained(clip_path),
        CLIPTokenizer.from_pretrained(clip_path),
    )
    directions = []
    for colour in COLOURS:
        texts = [f"a photo of a {colour} cup", f"a photo of a {colour}-colored cup",
                 f"a photo of a {colour} object"]  # fmt: skip
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            features = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        directions.append(F.normalize(features.mean(0), dim=0))
    torch.testing.assert_close(classify.directions("cup"), torch.stack(directions))
    crops = torch.cat([classify.crop(image, found) for found in objects])
    with torch.no_grad():
        pixels = (crops - torch.tensor(classify.clip.preprocessing.mean).view(1, 3, 1, 1)) / (
            torch.tensor(classify.clip.preprocessing.std).view(1, 3, 1, 1)
        )
        seen = model.get_image_features(pixels).pooler_output
    best = (seen @ torch.stack(directions).T).argmax(1)
    assert classify(image, objects, "cup") == [COLOURS[i] for i in best]


def test_geneval_runs_from_pixels_to_verdicts(detector_path: str, clip_path: str) -> None:
    reward = load_reward("geneval", path=detector_path, options={"clip": clip_path})
    assert isinstance(reward, GenEval) and not reward.differentiable
    images = as_tensor(*(natural(64, 64, seed) for seed in range(3)))
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    found = [kept(objects, 0.3) for objects in reward.detector(arrays, 0.3)]
    assert any(found)
    metadata = [{"tag": "two_object", "include": [need(name) for name in f] or [need("dog", 9)]}
                for f in found]  # fmt: skip
    prompts = [f"p{i}" for i in range(3)]
    scores = assert_rows_do_not_mix(reward, images, prompts, metadata)
    assert scores.tolist() == [float(bool(objects)) for objects in found]
    absent = [{"tag": "two_object", "include": [need("dog", 9)]}] * 3
    assert checked(reward, images, prompts, absent).tolist() == [0, 0, 0]
    assert reward.explain(images, prompts, absent)[0][0].startswith("expected 9 dog, found")
    name = next(label for objects in found for label in objects)
    coloured = [{"include": [need(name, color=colour)]} for colour in COLOURS]
    row = next(i for i, objects in enumerate(found) if name in objects)
    each = images[row].expand(len(COLOURS), -1, -1, -1)
    assert checked(reward, each, list(COLOURS), coloured).sum() == 1
    with pytest.raises(ValueError, match="'geneval': 'p' has no GenEval metadata"):
        checked(reward, images[:1], ["p"], [{}])
    with pytest.raises(ValueError, match="'p': the detector knows no 'unicorn'"):
        checked(reward, images[:1], ["p"], [{"include": [need("unicorn")]}])


def test_the_published_detector_knows_every_class_of_geneval(
    detector_path: str, tmp_path: Path
) -> None:
    """huggingface/label-files' coco-detection-mmdet-id2label.json, by which transformers'
    conversion of Mask2Former names 80 classes, has six names that COCO and GenEval do not."""
    other = {
        "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "tv": "tvmonitor",
        "potted plant": "pottedplant", "dining table": "diningtable",
        "computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard",
    }  # fmt: skip
    assert len(CLASSES) == 80 and other.keys() < CLASSES
    shutil.copytree(detector_path, tmp_path / "detector")
    file = tmp_path / "detector" / "config.json"
    facts = json.loads(file.read_text())
    for first in range(0, len(other), 3):
        three = list(other)[first : first + 3]
        facts["id2label"] = {str(i): other[name] for i, name in enumerate(three)}
        facts["label2id"] = {other[name]: i for i, name in enumerate(three)}
        file.write_text(json.dumps(facts))
        assert Detector(str(file.parent), "cpu").labels == three


def test_a_class_that_the_published_detector_does_not_know_is_refused_before_training() -> None:
    for label in CLASSES:
        check_prompts_fit(["geneval"], [Prompt("p", {"include": [need(label)]})])
    scene = {"include": [need("sofa")]}
    with pytest.raises(ValueError, match="'geneval' cannot score prompt 1: 'p': .* no 'sofa'"):
        check_prompts_fit(["geneval"], [Prompt("p", scene)])
    check_prompts_fit({"geneval": "another/detector"}, [Prompt("p", scene)])


def test_a_missing_detector_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'geneval': there is no Mask2Former at"):
        load_reward("geneval", path=str(tmp_path))

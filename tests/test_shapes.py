"""The world of shapes: its split, its renderer, and the checker that reads images back."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import ndimage

from tiltflow.rewards.worlds.shapes import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    Caption,
    Item,
    Placed,
    Scene,
    balanced,
    captions,
    render,
    sample_scene,
    split,
)
from tiltflow.rewards.worlds.shapes_checker import (
    Reading,
    Seen,
    caption_from_metadata,
    caption_from_text,
    read_scene,
    score,
    soft_score,
    strict_score,
)

RED_CIRCLE = Placed("circle", "red", 0.28, 0.5, 0.15)
BLUE_CROSS = Placed("cross", "blue", 0.72, 0.52, 0.15)
PAIR = Scene((RED_CIRCLE, BLUE_CROSS), "black")


def examples(n: int, seed: int) -> list[tuple[Caption, Scene]]:
    """`n` captions, half of each split, each with a scene drawn for it."""
    rng = np.random.default_rng(seed)
    chosen = balanced(True, n // 2, seed) + balanced(False, n - n // 2, seed)
    return [(caption, sample_scene(caption, rng)) for caption in chosen]


def truth(scene: Scene) -> Reading:
    """What a faultless reader would report of a scene."""
    seen = [Seen(o.shape, o.colour, o.x, o.y, o.radius, 1.0) for o in scene.objects]
    return Reading(tuple(seen), scene.background)


def degraded(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image blurred (sigma 0.6), shifted by up to a pixel each way and noisy (std 6)."""
    soft = ndimage.gaussian_filter(image.astype(float), (0.6, 0.6, 0.0))
    moved = ndimage.shift(soft, (*rng.integers(-1, 2, 2), 0), order=1, mode="nearest")
    noisy = moved + rng.normal(0.0, 6.0, moved.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def test_split_is_disjoint_and_leaves_no_category_empty() -> None:
    keys = []
    for held_out in (False, True):
        table = split(held_out)
        assert set(table) == set(CATEGORIES) and all(table.values())
        keys.append({c.split_key() for group in table.values() for c in group})
    assert not keys[0] & keys[1]
    share = sum(c.held_out for c in captions()) / sum(1 for _ in captions())
    assert 0.15 < share < 0.25


@pytest.mark.parametrize("relation, inverse", [RELATIONS[:2], RELATIONS[2:]])
def test_a_relation_and_its_inverse_fall_in_the_same_split(relation: str, inverse: str) -> None:
    for caption in captions():
        if caption.relation == relation:
            other = dataclasses.replace(caption, items=caption.items[::-1], relation=inverse)
            assert other.split_key() == caption.split_key()
            assert other.held_out == caption.held_out


def test_the_order_of_two_items_does_not_matter_to_the_split() -> None:
    for caption in captions():
        if caption.category == "two_object":
            other = dataclasses.replace(caption, items=caption.items[::-1])
            assert other.held_out == caption.held_out


def test_balanced_is_deterministic_and_balanced() -> None:
    first = balanced(True, 600, seed=3)
    assert first == balanced(True, 600, seed=3)
    assert first != balanced(True, 600, seed=4)
    assert first[:60] == balanced(True, 60, seed=3)
    assert all(caption.held_out for caption in first)
    assert [caption.category for caption in first] == list(CATEGORIES) * 100


def test_scenes_and_renders_are_deterministic() -> None:
    for (caption, a), (_, b) in zip(examples(12, 5), examples(12, 5), strict=True):
        assert a == b, caption.text
        assert np.array_equal(render(a), render(b))


def test_objects_keep_to_their_own_quarters_and_are_blue_unless_coloured() -> None:
    for caption, scene in examples(120, 11):
        quarters = {(o.x > 0.5, o.y > 0.5) for o in scene.objects}
        assert len(quarters) == len(scene.objects) == sum(i.count for i in caption.items)
        if all(item.colour is None for item in caption.items):
            assert {o.colour for o in scene.objects} == {"blue"}


def test_render_draws_the_named_colours() -> None:
    image = render(PAIR)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert tuple(image[0, 0]) == BACKGROUNDS["black"]
    assert tuple(image[32, 18]) == COLOURS["red"]
    assert tuple(image[33, 46]) == COLOURS["blue"]


def test_caption_texts_are_unique_and_read_back() -> None:
    every = list(captions())
    assert len({caption.text for caption in every}) == len(every)
    for caption in every[::7]:
        assert caption_from_text(caption.text) == caption
        assert caption_from_metadata(json.loads(json.dumps(caption.metadata()))) == caption


def test_caption_text_known_answers() -> None:
    items = (Item("circle", "red"), Item("cross", "orange"))
    expected = Caption("position", items, "left of", "white")
    assert caption_from_text("a red circle left of an orange cross on white") == expected
    counting = Caption("counting", (Item("cross", None, 3),))
    assert caption_from_text("three crosses") == counting


@pytest.mark.parametrize("text", ["", "a dog", "an red circle", "five circles", "a circle on red"])
def test_text_outside_the_world_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the world of shapes"):
        caption_from_text(text)


def test_metadata_that_contradicts_its_prompt_is_refused() -> None:
    metadata = caption_from_text("a red circle").metadata()
    with pytest.raises(ValueError, match="has background None, not 'white'"):
        caption_from_metadata(metadata | {"background": "white"})
    with pytest.raises(ValueError, match="'prompt'"):
        caption_from_metadata({"tag": "colors"})


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reading_recovers_each_shape_in_each_colour(shape: str, background: str) -> None:
    for colour in COLOURS:
        placed = Placed(shape, colour, 0.43, 0.56, 0.12)
        reading = read_scene(render(Scene((placed,), background)))
        assert reading.background == background
        (seen,) = reading.objects
        assert (seen.shape, seen.colour) == (shape, colour)
        found, drawn = ([o.x, o.y, o.radius] for o in (seen, placed))
        assert np.allclose(found, drawn, atol=0.25 / 64)
        assert seen.confidence > 0.9


def test_renders_satisfy_their_captions() -> None:
    scores = [strict_score(render(scene), caption) for caption, scene in examples(600, 0)]
    assert np.mean(scores) >= 0.997


def test_mildly_degraded_renders_satisfy_their_captions() -> None:
    rng = np.random.default_rng(1)
    scores = [
        strict_score(degraded(render(scene), rng), caption) for caption, scene in examples(600, 1)
    ]
    assert np.mean(scores) >= 0.99


@pytest.mark.parametrize("size", [32, 128])
def test_other_sizes_are_read_too(size: int) -> None:
    scores = [strict_score(render(scene, size), caption) for caption, scene in examples(60, 2)]
    assert np.mean(scores) >= 0.95


def test_other_captions_are_rejected_unless_they_hold() -> None:
    pairs = examples(600, 3)
    wrong = 0
    for (caption, _), (_, scene) in zip(pairs, pairs[7:] + pairs[:7], strict=True):
        wrong += strict_score(render(scene), caption) != score(truth(scene), caption)[0]
    assert wrong <= 1


# Each change makes PAIR break the caption below in one way; the soft score is known: the
# atoms are two shapes, two colours, the number, the relation and the background, seven in all.
FULL = "a red circle left of a blue cross on black"
CHANGES = {
    "nothing": (PAIR, 1.0),
    "a colour": (
        Scene((dataclasses.replace(RED_CIRCLE, colour="pink"), BLUE_CROSS), "black"),
        6 / 7,
    ),
    "a shape": (
        Scene((RED_CIRCLE, dataclasses.replace(BLUE_CROSS, shape="square")), "black"),
        6 / 7,
    ),
    "the background": (Scene(PAIR.objects, "white"), 6 / 7),
    "the relation": (
        Scene(
            (dataclasses.replace(RED_CIRCLE, x=0.72), dataclasses.replace(BLUE_CROSS, x=0.28)),
            "black",
        ),
        6 / 7,
    ),
    "an object less": (Scene((RED_CIRCLE,), "black"), 3 / 7),
    "an object more": (
        Scene((*PAIR.objects, Placed("circle", "red", 0.5, 0.85, 0.1)), "black"),
        6 / 8,
    ),
    "no object": (Scene((), "black"), 1 / 7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_scores_of_one_change(change: str) -> None:
    scene, soft = CHANGES[change]
    image, caption = render(scene), caption_from_text(FULL)
    assert soft_score(image, caption) == pytest.approx(soft)
    assert strict_score(image, caption) == float(change == "nothing")


@pytest.mark.parametrize("drawn", [1, 2, 3, 4])
def test_counts_are_exact(drawn: int) -> None:
    places = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)][:drawn]
    image = render(Scene(tuple(Placed("cross", "cyan", x, y, 0.12) for x, y in places), "white"))
    for n, word in enumerate(("two", "three"), start=2):
        for text in (f"{word} crosses", f"{word} cyan crosses on white"):
            assert strict_score(image, caption_from_text(text)) == float(n == drawn)
        assert strict_score(image, caption_from_text(f"{word} blue crosses")) == 0.0
        assert strict_score(image, caption_from_text(f"{word} squares")) == 0.0


def test_objects_of_one_shape_are_told_apart_by_colour() -> None:
    left, right = (Placed("square", c, x, 0.5, 0.14) for c, x in (("green", 0.25), ("red", 0.75)))
    image = render(Scene((left, right), "white"))
    for text, holds in {
        "a red square and a green square": 1.0,
        "a red square right of a green square": 1.0,
        "a red square left of a green square": 0.0,
        "a green square left of a red square on white": 1.0,
        "a red square and a green circle": 0.0,
    }.items():
        assert strict_score(image, caption_from_text(text)) == holds, text


def test_touching_objects_of_two_colours_are_two_objects() -> None:
    objects = (
        Placed("circle", "red", 0.34, 0.5, 0.16),
        Placed("square", "yellow", 0.64, 0.5, 0.16),
    )
    for background in BACKGROUNDS:
        image = render(Scene(objects, background))
        assert strict_score(image, caption_from_text("a red circle left of a yellow square")) == 1.0


def test_touching_objects_of_one_colour_have_no_shape() -> None:
    objects = tuple(Placed("circle", "red", x, 0.5, 0.16) for x in (0.36, 0.64))
    (seen,) = read_scene(render(Scene(objects, "black"))).objects
    assert seen.shape is None and seen.colour == "red"


def test_unknown_shapes_colours_and_backgrounds_are_none() -> None:
    image = render(Scene((RED_CIRCLE,), "black"))
    grey = np.where(image == image[32, 18], np.uint8(128), image)
    assert [o.colour for o in read_scene(grey).objects] == [None]
    assert strict_score(grey, caption_from_text("a circle")) == 0.0
    half = image.copy()
    half[32:] = BACKGROUNDS["black"]
    assert [o.shape for o in read_scene(half).objects] == [None]
    assert strict_score(half, caption_from_text("a red circle")) == 0.0
    teal = np.where((image == 16).all(2, keepdims=True), np.array([20, 110, 110], np.uint8), image)
    assert read_scene(teal).background is None
    assert strict_score(teal, caption_from_text("a red circle")) == 1.0
    assert strict_score(teal, caption_from_text("a red circle on black")) == 0.0


def test_specks_are_ignored_and_blobs_are_not() -> None:
    caption = caption_from_text("a red circle on black")
    image = render(Scene((RED_CIRCLE,), "black"))
    image[5:8, 50:53] = COLOURS["green"]
    assert strict_score(image, caption) == 1.0
    image[5:10, 50:55] = COLOURS["green"]
    assert strict_score(image, caption) == 0.0
    assert soft_score(image, caption) == pytest.approx(3 / 5)


def test_arbitrary_pixels_are_scored_without_errors() -> None:
    rng = np.random.default_rng(0)
    caption = caption_from_text(FULL)
    for spread in (0.0, 1.0, 4.0):
        field = rng.normal(0.0, 100.0 * (1 + spread) ** 1.5, (64, 64, 3))
        field = ndimage.gaussian_filter(field, (spread, spread, 0.0)) + 128
        image = np.clip(field, 0, 255).astype(np.uint8)
        assert strict_score(image, caption) == 0.0
        assert 0.0 <= soft_score(image, caption) < 1.0


def test_a_part_whose_median_is_the_background_is_an_object() -> None:
    image = np.full((64, 64, 3), 16, np.uint8)
    for y, x in np.ndindex(20, 20):
        image[20 + y, 20 + x, (x + y) % 3] = 200
    (seen,) = read_scene(image).objects
    assert seen.colour is None and np.allclose((seen.x, seen.y), 30 / 64)


def test_what_is_no_image_is_refused() -> None:
    for image in (np.zeros((64, 64, 3)), np.zeros((64, 32, 3), np.uint8), np.zeros(3, np.uint8)):
        with pytest.raises(ValueError, match="the image must be"):
            read_scene(image)

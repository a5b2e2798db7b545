"""Rewards fitted to choices: what is recovered, what is refused, a reward like others."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiltflow.config.schema import RewardConfig
from tiltflow.data.preferences import Preference, agreement, load_preferences
from tiltflow.models.medium import VIDEOS, spread
from tiltflow.rewards.base import checked, load_reward
from tiltflow.rewards.fitting import check_prompts_fit, check_reward_imports
from tiltflow.rewards.frames import FRAMES, OfFrames
from tiltflow.rewards.sizes import reward_memory
from tiltflow.rewards.zoo.clip_family import CLIPScore
from tiltflow.rewards.zoo.votes import CLIP_WHOLE, features, whole_identity
from tiltflow.tasks import fit_reward as task
from tiltflow.tasks.fit_reward import Choices, fit, regression

N = 150


def picture(rng: np.random.Generator, light: float) -> Image.Image:
    """A grey ground with a coloured square somewhere."""
    pixels = np.full((64, 64, 3), 255 * light, dtype=np.uint8)
    top, left = rng.integers(4, 40, 2)
    pixels[top : top + 18, left : left + 18] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def votes(folder: Path, noise: float, seed: int = 0) -> Path:
    """Choices of somebody who likes dark grounds, of which the share `noise` is by lot."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(N):
        lights = rng.permutation([0.05, 0.95])
        for name, light in zip("ab", lights, strict=True):
            picture(rng, light).save(folder / f"{i}{name}.png")
        darker = "a" if lights[0] < lights[1] else "b"
        choice = darker if rng.random() >= noise else rng.choice(["a", "b", "tie"])
        names = {"image_a": f"{i}a.png", "image_b": f"{i}b.png"}
        prompt = f"a square {chr(97 + i % 25)} {'xy'[i % 50 // 25]}"
        rows.append({"prompt": prompt, **names, "choice": str(choice)})
    file = folder / "preferences.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    place = tmp_path_factory.mktemp("fit")
    about = task.fit_reward([votes(place, 0.1)], place / "taste", "packaged:clip", "cpu")
    return place, about


def test_votes_on_videos_are_of_all_that_a_score_sees(tmp_path):
    """The frames after the first, by which people choose: a mean, as a video's score is."""
    videos = torch.rand(2, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    videos[1, 0] = videos[0, 0]
    videos = VIDEOS.rounded(videos)
    for video, name in zip(VIDEOS.encode(videos), "ab", strict=True):
        VIDEOS.save(video, tmp_path / f"{name}.png")
    row = {"prompt": "a square", "image_a": "a.png", "image_b": "b.png", "choice": "a"}
    (tmp_path / "votes.jsonl").write_text(json.dumps(row) + "\n")
    preferences = load_preferences(tmp_path / "votes.jsonl")
    seen = spread(9, FRAMES)
    for video, read in zip(videos, preferences[0].images(), strict=True):
        assert torch.equal(read, video[seen])
    measured = task.measure(preferences, CLIPScore("packaged:clip"), print)
    weight = np.random.default_rng(0).normal(size=measured.differences.shape[1])

    class Linear:
        name, differentiable = "linear in features", False

        def __call__(self, images, prompts, metadata):
            found = features(CLIPScore("packaged:clip"), images, prompts).double()
            return (found @ torch.from_numpy(weight)).float()

    scores = checked(OfFrames(Linear()), videos, ["a square"] * 2, [{}] * 2)
    assert float(scores[0] - scores[1]) == pytest.approx(measured.differences[0] @ weight, abs=1e-4)
    assert abs(measured.differences).max() > 1e-3


def test_a_file_that_is_given_twice_makes_no_vote_count_as_two(tmp_path):
    """30 votes are too few, also by another name of their file."""
    row = {"prompt": "a", "image_a": "x.png", "image_b": "y.png", "choice": "a"}
    (tmp_path / "votes.jsonl").write_text((json.dumps(row) + "\n") * 30)
    (tmp_path / "same.jsonl").symlink_to(tmp_path / "votes.jsonl")
    files = [tmp_path / "votes.jsonl", tmp_path / "same.jsonl"]
    with pytest.raises(ValueError, match=r"same\.jsonl is given twice"):
        task.fit_reward(files, tmp_path / "out", "packaged:clip", "cpu")
    with pytest.raises(ValueError, match="30 votes prefer one image"):
        task.fit_reward(files[:1], tmp_path / "out", "packaged:clip", "cpu")


def test_votes_of_a_copy_do_not_count_as_two(tmp_path):
    """Of a whole one, and of an older one, which has the first of the votes: 30 of them are too
    few, and passed for 60."""
    lines = []
    for i in range(30):
        row = {"prompt": f"a {i % 12}", "image_a": f"{i}.png", "image_b": "y.png", "choice": "a"}
        row |= {"time": 1e9 + i, "sha256_a": f"{i}", "sha256_b": "y"}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "elsewhere").mkdir()
    votes, copy, older = (tmp_path / n for n in ("votes.jsonl", "copy.jsonl", "elsewhere/o.jsonl"))
    votes.write_text("".join(lines))
    copy.write_text("".join(lines))
    older.write_text("".join(lines[:20]).replace('"image_a": "', '"image_a": "../'))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"copy\.jsonl is given twice: .*votes\.jsonl holds the"):
        task.fit_reward([votes, copy], out, "packaged:clip", "cpu")
    with pytest.raises(ValueError, match=r"o\.jsonl has 20 votes that stand in .*votes\.jsonl too"):
        task.fit_reward([votes, older], out, "packaged:clip", "cpu")
    copy.write_text("".join(lines + lines[:1]))
    with pytest.raises(ValueError, match=r"copy\.jsonl has 1 vote that stands there already, and"):
        task.fit_reward([copy], out, "packaged:clip", "cpu")
    copy.write_text("".join(lines).replace('"time": 1', '"time": 2'))  # voted on once more
    task.check_votes({file: load_preferences(file) for file in (votes, copy)})


def test_a_pair_is_known_by_its_images_wherever_they_lie():
    """Votes on copies of two images contradict each other like those on the images."""
    rows = [
        Preference(f"a {i}", folder / f"{i}.png", folder / "y.png", choice, (f"{i}", "y"))
        for i in range(10)
        for folder, choice in ((Path("here"), 1.0), (Path("there"), 0.0))
    ]
    assert agreement(rows) == (10, 10)


def test_a_taste_is_recovered_and_the_folder_is_a_reward(fitted):
    place, about = fitted
    low, high = about["accuracy_ci95"]
    assert 0.8 < low < about["accuracy"] < high <= 1
    name = str(place / "taste")
    reward = load_reward(name)
    rng = np.random.default_rng(1)
    lights = np.repeat([0.05, 0.95], 20)
    images = torch.stack(
        [
            torch.from_numpy(np.asarray(picture(rng, x)).copy()).permute(2, 0, 1) / 255
            for x in lights
        ]
    )
    scores = checked(reward, images, ["a square"] * 40, [{}] * 40)
    assert np.corrcoef(scores, lights)[0, 1] < -0.8
    assert reward.name == name
    check_reward_imports([name])
    check_prompts_fit([name], [])
    assert reward_memory({name: RewardConfig(weight=1.0)})[name] > 0


def test_a_fit_knows_the_whole_of_its_clip(fitted):
    place, about = fitted
    kept = json.loads((place / "taste" / "reward.json").read_text())
    assert kept[CLIP_WHOLE] == about[CLIP_WHOLE] == whole_identity(CLIPScore("packaged:clip"))


def test_the_reward_is_differentiable_and_a_function_of_its_image_alone(fitted):
    reward = load_reward(str(fitted[0] / "taste"))
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    prompts = ["red", "two", "three"]
    images.requires_grad_()
    scores = checked(reward, images, prompts, [{}] * 3)
    (slope,) = torch.autograd.grad(scores.sum(), images)
    assert slope.abs().sum() > 0 and slope.isfinite().all()
    alone = checked(reward, images[1:2].detach(), prompts[1:2], [{}])
    assert torch.equal(scores[1:2].detach(), alone)
    with torch.no_grad():
        nudged = checked(reward, (images + 0.003 * slope.sign()).clamp(0, 1), prompts, [{}] * 3)
    assert (nudged > scores).all()


def test_the_scale_is_that_of_the_voted_images(fitted):
    place, _ = fitted
    reward = load_reward(str(place / "taste"))
    preferences = load_preferences(place / "preferences.jsonl")
    seen = torch.cat([torch.cat(p.images()) for p in preferences])
    scores = checked(reward, seen, [p.prompt for p in preferences for _ in "ab"], [{}] * len(seen))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-3)
    assert float(scores.std()) == pytest.approx(1, abs=0.01)


def test_choices_on_prompts_that_the_packaged_clip_cannot_read_are_refused(tmp_path):
    file = votes(tmp_path, 0.1)
    file.write_text(file.read_text().replace("a square", "a portrait of a lady", 1))
    with pytest.raises(ValueError, match="packaged:clip cannot read 'a portrait"):
        task.fit_reward([file], tmp_path / "taste", "packaged:clip", "cpu")


def test_choices_by_lot_are_refused(tmp_path):
    file = votes(tmp_path, 1.0, seed=1)
    with pytest.raises(ValueError, match="cannot be told from chance"):
        task.fit_reward([file], tmp_path / "taste", "packaged:clip", "cpu")
    assert not (tmp_path / "taste").exists()


@pytest.mark.long
def test_the_accuracy_of_pure_noise_is_honest():
    """Of 40 sets of choices by lot, about 1 in 40 may pass: nested splits do not flatter."""
    passed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        seen = rng.normal(size=(120, 20)) / 4
        chosen = rng.integers(0, 2, 60).astype(float)
        found = fit(Choices(seen[:60] - seen[60:], chosen, np.arange(60), seen))
        passed += found.interval[0] > 0.5
    assert passed <= 4


def test_votes_on_one_prompt_are_no_independent_ones():
    """Nine of twelve prompts, each voted on twenty times in the same way, are nine of twelve."""
    groups = np.repeat(np.arange(12), 20)
    rng = np.random.default_rng(3)
    x = np.abs(rng.normal(1, 0.05, (240, 1)))
    chosen = np.where(groups < 9, 1.0, 0.0)
    found = fit(Choices(x, chosen, groups, np.concatenate([x, x - x])))
    assert found.accuracy == 0.75 and found.decided == 240
    assert found.interval[0] < 0.5  # 240 votes by themselves would give [.69, .80]


def test_the_regression_is_at_its_optimum():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)), rng.choice([0.0, 0.5, 1.0], 80)
    weight = regression(x, y, 2.0)
    slope = x.T @ (1 / (1 + np.exp(-x @ weight)) - y) + weight / 2.0
    assert np.abs(slope).max() < 1e-3


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("p", "x", "y", 1.0)] * 10, "10 votes prefer one image"),
        ([("p", "x", "y", 0.5)] * 60, "0 votes prefer one image .60 none."),
        ([("p", f"x{i}", "y", 1.0) for i in range(60)], "are on 1 prompt; a reward needs 10"),
        (
            [(f"p{i % 30}", "x", "y", float(i < 30)) for i in range(60)],
            "contradict each other: of 30 pairs .* 30 were decided both ways",
        ),
    ],
)
def test_too_few_or_contradictory_choices_are_refused(rows, sentence):
    preferences = [Preference(p, Path(a), Path(b), c) for p, a, b, c in rows]
    with pytest.raises(ValueError, match=sentence):
        task.check_choices(preferences)


def test_the_same_pair_the_other_way_round_is_one_pair():
    same = [Preference("p", Path("x"), Path("y"), 1.0), Preference("p", Path("y"), Path("x"), 0.0)]
    assert agreement(same) == (1, 0)
    assert agreement([*same, Preference("p", Path("x"), Path("y"), 0.0)]) == (1, 1)


def png(colour: int) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(packed, "PNG")
    return packed.getvalue()


def test_pick_a_pic_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {
        "caption": ["a", "b", "c"],
        "jpg_0": [png(10), png(20), png(30)],
        "jpg_1": [png(40), png(50), png(60)],
        "label_0": [1.0, 0.5, 0.0],
        "label_1": [0.0, 0.5, 1.0],
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "pick.parquet")
    found = load_preferences(tmp_path / "pick.parquet")
    assert [(one.prompt, one.choice) for one in found] == [("a", 1.0), ("b", 0.5), ("c", 0.0)]
    assert float(found[2].images()[1][0, 0, 0, 0]) == pytest.approx(60 / 255)


def test_hpd_is_read(tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(3):
        (tmp_path / "train" / f"{i}.jpg").write_bytes(png(i))
    two = {"prompt": "a", "image_path": ["0.jpg", "1.jpg"], "human_preference": [0, 1]}
    three = {
        "prompt": "b",
        "image_path": ["0.jpg", "1.jpg", "2.jpg"],
        "human_preference": [2, 0, 2],
    }
    third = {"prompt": "c", "path1": "2.jpg", "path2": "0.jpg", "confidence": 0.9}
    (tmp_path / "train.json").write_text(json.dumps([two, three, third]))
    found = load_preferences(tmp_path / "train.json")
    assert [(one.prompt, one.choice) for one in found] == [
        ("a", 0.0), ("b", 1.0), ("b", 0.0), ("c", 1.0)
    ]  # fmt: skip
    assert found[3].first == tmp_path / "train" / "2.jpg"
    assert found[3].images()[0].shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("x.jsonl", "", "holds no preference"),
        ("x.jsonl", "{}\n", "line 1 is no vote"),
        ("x.jsonl", '{"prompt":"a","image_a":"x","image_b":"y","choice":"c"}\n', "a, b or tie"),
        ("x.csv", "", "preferences are in .jsonl"),
        ("x.json", "{", "is not JSON"),
        ("x.json", "{}", "it is no list"),
        ("x.json", "[1]", "entry 1 is not HPD's"),
        ("x.json", '[{"prompt":"a","path1":"../x","path2":"y"}]', "outside its folder"),
        ("x.json", '[{"prompt":"a","path1":"/x","path2":"y"}]', "outside its folder"),
        (
            "x.json",
            '[{"prompt":"a","image_path":["x","y"],"human_preference":["good",0]}]',
            "entry 1 is not HPD's",
        ),
        (
            "x.json",
            '[{"prompt":"a","image_path":["x","y"],"human_preference":[NaN,0]}]',
            "entry 1 is not HPD's",
        ),
        ("x.parquet", "no parquet", "no parquet file that can be read"),
    ],
)
def test_what_is_no_file_of_preferences_is_refused(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_preferences(tmp_path / name)


def test_an_image_that_was_changed_after_the_vote_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    row = {"prompt": "p", "image_a": "a.png", "image_b": "a.png", "choice": "a"}
    row |= {"sha256_a": "0" * 64, "sha256_b": "0" * 64}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    (one,) = load_preferences(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="another image than the one that was voted on"):
        one.images()


def test_an_image_whose_name_no_file_can_have_is_refused_by_name(tmp_path):
    row = {"prompt": "p", "image_a": "a\0.png", "image_b": "b.png", "choice": "a"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    (one,) = load_preferences(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="is no image that can be read"):
        one.images()


def test_a_broken_folder_is_refused_in_a_sentence(fitted, tmp_path):
    place, _ = fitted
    facts = json.loads((place / "taste" / "reward.json").read_text())
    for change, sentence in (
        ({"clip": "packaged:clip_heldout"}, "was fitted on another CLIP"),
        ({"format": "x"}, "does not describe a fitted reward"),
    ):
        (tmp_path / "reward.json").write_text(json.dumps(facts | change))
        with pytest.raises(ValueError, match=sentence):
            load_reward(str(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things"):
        task.check_out(tmp_path / "other")

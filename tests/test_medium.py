"""What is generated as one object: images, points, and waves that an example brings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiltflow.config.load import load_config
from tiltflow.core import registry
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.core.metrics import read_metrics
from tiltflow.core.randomness import Randomness
from tiltflow.data.embeddings import encode_prompts
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.diversity import features_of
from tiltflow.evaluation.scores import Diversity, System, evaluate_systems
from tiltflow.models.medium import IMAGES, POINTS, load_medium
from tiltflow.rewards.base import at_once_of, load_reward
from tiltflow.setup.build import build_stage
from tiltflow.tasks.evaluate import save_samples
from tiltflow.tasks.systems import Loaded, Sampler

EXAMPLES = Path(__file__).parents[1] / "examples"
WAVES = "own_medium:Waves"
SHORT = [
    "train.steps=2", "train.batch_size=32", "checkpoint.every=2", "log.samples_every=2",
    "log.samples=4", "run.device=cpu", "watch.rewards={test_medium:middle: 1.0}", "watch.every=2",
    "watch.prompts=16",
]  # fmt: skip


def middle(waves, prompts, metadata):
    """A held-out reward of waves: how low they are in the middle."""
    return -waves[:, waves.shape[1] // 2]


middle.domain = WAVES


@pytest.fixture(scope="module")
def outside() -> Iterator[Any]:
    """The example's module, which lies outside the package."""
    sys.path.insert(0, str(EXAMPLES))
    import own_medium

    yield own_medium
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def run(outside: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outside.main(tmp_path_factory.mktemp("waves"), *SHORT)  # type: ignore[no-any-return]


def test_both_stages_train_on_a_medium_from_outside(run: Path, outside: Any) -> None:
    assert len((EXAMPLES / "own_medium.py").read_text().splitlines()) <= 60
    sheet = np.asarray(Image.open(run / "samples" / "step-000002.png"))
    assert sheet.shape == (outside.SIDE, outside.LENGTH, 3)  # a sample a prompt
    assert np.count_nonzero((sheet == 0).all(-1)) == outside.LENGTH  # a dot a moment
    rows = read_metrics(run / "metrics.jsonl")
    assert all(f"watch/{name}" in rows[-1] for name in ("drift", "diversity"))
    assert "watch/high_frequency" not in rows[-1]  # waves have no pixels
    assert any("reward/own_medium:onset" in row for row in rows)


def test_what_was_trained_is_evaluated_and_saved(run: Path, outside: Any, tmp_path: Path) -> None:
    build = build_stage(load_config(str(run / "config.yaml")))
    roles, medium = build.stage.roles, build.backbone.medium
    roles.load(load_checkpoint(run).tensors)
    prompts = [Prompt("")] * 6
    sampler = Sampler(encode_prompts(build.backbone, prompts), Randomness(0), guidance=1.0)
    systems = sampler.systems(Loaded(build.backbone, roles.teacher, {"rtdmd": roles.ema}))
    reward = load_reward("own_medium:onset")
    assert at_once_of(reward) == 1  # as the medium says

    def save(system: str, rows: Any, encoded: Any) -> None:
        save_samples(medium, tmp_path / system, rows, encoded)

    features = features_of(medium, [reward])
    assert features is not None
    found = evaluate_systems(
        systems, prompts, [reward], 4, save_images=save, medium=medium,
        diversity=Diversity(features, 4, 2), comparisons=[("rtdmd", "teacher")],
    )  # fmt: skip
    kept = [np.load(tmp_path / "rtdmd" / f"{row:05d}.npy") for row in range(6)]
    assert [wave.shape for wave in kept] == [(outside.LENGTH,)] * 6
    scores = found.scores["rtdmd"]["own_medium:onset"]
    assert np.array_equal(scores.astype(np.float32), [wave[0] for wave in kept])
    assert found.images["rtdmd"].shape == (6, outside.SIDE, outside.LENGTH, 3)
    assert "diversity" in found.summary["systems"]["rtdmd"]["scores"]


def test_a_reward_of_another_medium_is_refused(outside: Any, tmp_path: Path) -> None:
    waves, system = load_medium(WAVES), System("a", 1, lambda rows: torch.zeros(len(rows), 2))
    for name, other, here in (("linear", waves, "waves"), ("own_medium:onset", POINTS, "points")):
        reward = load_reward(name)
        with pytest.raises(ValueError, match=f"{name}' scores .* but here {here} are generated"):
            evaluate_systems([system], [Prompt("")] * 2, [reward], 1, medium=other)
    with pytest.raises(ValueError, match="reward 'linear' scores points, but here waves are"):
        outside.main(tmp_path, *SHORT[:-3], "watch.rewards={linear: 1.0}", "watch.every=2")


def test_a_medium_is_found_by_entry_point_and_by_dotted_path(
    outside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_medium.cache_clear()
    point = EntryPoint("waves", WAVES, "tiltflow.media")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] * (group == point.group))
    for name in ("waves", WAVES):
        assert isinstance(load_medium(name), outside.Waves)
        assert load_medium(name) is load_medium(name)
    load_medium.cache_clear()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("image", r"there is no medium 'image'; did you mean 'images'\? \(a medium of your own is"),
        ("nowhere.at.all:Waves", "medium 'nowhere.at.all:Waves': cannot import 'nowhere.at.all'"),
        ("own_medium:Wave", "medium 'own_medium:Wave': 'own_medium' has no 'Wave'; did you mean"),
        ("own_medium:LENGTH", "medium 'own_medium:LENGTH' has no at_once, check, decode, encode"),
    ],
)
def test_what_is_no_medium_says_one_sentence(outside: Any, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_medium(name)


def test_images_are_in_files_what_was_scored(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    shown = IMAGES.rounded(images)
    assert 0 < float((shown - images).abs().max()) <= 0.5 / 255
    save_samples(IMAGES, tmp_path, range(3), IMAGES.encode(shown))
    for row in range(3):
        pixels = np.asarray(Image.open(tmp_path / f"{row:05d}.png"))
        assert pixels.shape == (4, 6, 3)
        assert torch.equal(torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1), shown[row])
    sheet = IMAGES.sheet(shown, 2)
    assert sheet.shape == (8, 12, 3) and (sheet[4:, 6:] == 255).all()  # white where none is
    assert np.array_equal(sheet[4:, :6], IMAGES.encode(shown)[2])


def test_the_first_fault_names_its_rows() -> None:
    images = torch.zeros(3, 3, 2, 2)
    assert IMAGES.check(images) is None
    images[1, 0, 0, 0] = 1.1
    fault = IMAGES.check(images)
    assert fault and fault.finite and fault.rows.tolist() == [False, True, False]
    images[2, 0, 0, 0] = float("nan")
    fault = IMAGES.check(images)
    assert fault and not fault.finite and fault.rows.tolist() == [False, False, True]
    points = torch.tensor([[5.0, float("inf")], [1e9, 0.0]])
    fault = POINTS.check(points)
    assert fault and fault.what == "non-finite point" and fault.rows.tolist() == [True, False]
    for medium, wrong in ((IMAGES, points), (POINTS, images), (POINTS, points.int())):
        with pytest.raises(ValueError, match=r"^needs \(B, .*, got"):
            medium.check(wrong)  # type: ignore[attr-defined]

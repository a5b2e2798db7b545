"""What a killed evaluation may go on with: chunks of the same question, and each batch its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiltflow.core.distributed import Ranks
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.chunks import Chunks
from tiltflow.evaluation.scores import Diversity, System, evaluate_systems
from tiltflow.rewards import FunctionReward
from tiltflow.tasks import evaluate as evaluating
from tiltflow.tasks.depends import asked
from tiltflow.tasks.evaluate import evaluated
from tiltflow.tasks.interface import request_of
from tiltflow.tasks.request import Request


class OneOfFour(Ranks):
    """Rank 3 of 4 by itself, as though the others' rows were its own. These have to be as many as
    theirs, or the ranks' sums would not fit together."""

    def gather(self, part: Tensor, n: int) -> Tensor:
        each = -(-len(PROMPTS) // self.size)
        assert (len(part), n) == (each, each * self.size)
        return torch.cat([part] * self.size)


PROMPTS = [Prompt(f"prompt {i}") for i in range(9)]


def test_two_batches_of_a_rank_that_begin_with_the_same_row_are_two(tmp_path: Path) -> None:
    """Of 9 prompts rank 3 has the last one three times: batches (8, 8) and (8,)."""

    def grey(rows: Sequence[int]) -> Tensor:
        return torch.stack([torch.full((3, 4, 4), row / 10) for row in rows])

    system = System("one", 4, grey, lambda rows, draw: grey(rows))
    mean = FunctionReward(lambda images, prompts, metadata: images.mean((1, 2, 3)), "mean")
    features = Diversity(lambda images: torch.ones(len(images), 2) / 2**0.5, prompts=9, images=2)
    kept = Chunks(tmp_path, {})
    for _ in range(2):  # made, and taken again
        found = evaluate_systems(
            [system], PROMPTS, [mean], 2, take=kept.take, ranks=OneOfFour(3, 4), diversity=features
        )
        assert found.scores["one"]["mean"].tolist() == pytest.approx([0.8] * 9)
        assert len(found.scores["one"]["diversity"]) == 9
    assert len(kept) == 2 * (1 + features.images)


@pytest.mark.parametrize(
    ("upgraded", "rewards", "counts"),
    [
        ("diffusers", "clipscore", True),
        ("transformers", "clipscore", True),
        ("tokenizers", "clipscore", True),
        ("rapidocr", "clipscore", False),
        ("rapidocr", "ocr", True),
        ("onnxruntime", "ocr", True),
    ],
)
def test_an_upgrade_of_a_package_is_another_question(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, upgraded: str, rewards: str, counts: bool
) -> None:
    (tmp_path / "p.txt").write_text('a sign "GO"\na sign "NO"\n')
    request = request_of("packaged:pipeline", str(tmp_path / "p.txt"), {}, rewards={rewards: None})

    def of(name: str, number: str) -> str:
        if name in ("rapidocr", "onnxruntime", upgraded):
            return number if name == upgraded else "1.0"
        return version(name)

    found = []
    for number in ("1.0", "99.0"):
        monkeypatch.setattr("tiltflow.tasks.depends.version", lambda name, n=number: of(name, n))
        found.append(asked(request))
    assert (found[0] != found[1]) == counts


def test_what_mends_prompts_counts(tiny_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a sign\n")
    for model, counts in (("wan", True), ("sana", False)):
        request = request_of(str(tiny_pipeline(model)), str(tmp_path / "p.txt"), {}, rewards={})
        assert ("ftfy" in asked(request)["versions"]) == counts


def test_a_missing_package_is_named_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none_of_ocr(name: str) -> str:
        if name in ("rapidocr", "onnxruntime"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("tiltflow.tasks.depends.version", none_of_ocr)
    (tmp_path / "p.txt").write_text('a sign "GO"\n')
    request = request_of("packaged:pipeline", str(tmp_path / "p.txt"), {}, rewards={"ocr": None})
    assert set(asked(request)["versions"]) == {
        "tiltflow", "torch", "diffusers", "transformers", "tokenizers",
    }  # fmt: skip


@pytest.mark.long
def test_a_kill_while_old_images_are_removed_leaves_no_folder_that_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on. It was refused: without its prompts the folder passed for another
    one's."""
    prompts = [Prompt("a red circle"), Prompt("a blue square")]
    request = Request(
        "packaged:pipeline", prompts, teacher_steps=1, device="cpu", rewards={"clipscore": None}
    )
    out = tmp_path / "evaluation.json"
    evaluated(out, request)

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        file = folder / evaluating.PROMPTS
        if file.is_file():
            file.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        evaluated(out, request)
    evaluated(out, request)
    kept = (out.with_suffix(".images") / evaluating.PROMPTS).read_text()
    assert kept.split("\n")[0] == "a red circle"
    assert not out.with_suffix(".parts").exists()

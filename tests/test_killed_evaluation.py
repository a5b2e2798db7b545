"""What a killed evaluation may go on with: chunks of the same question, and each batch its own."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tiltflow.tasks.depends import asked
from tiltflow.tasks.interface import request_of


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

"""Hub ids: downloaded through `snapshot_download`, or taken from the hub's cache on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_pipelines import RESOLUTION

from tiltflow.models.families import load_backbone, local_pipeline
from tiltflow.rewards import load_reward

Tiny = Callable[[str], Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_an_id_is_downloaded_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert local_pipeline("org/model") == tmp_path / "snapshot"
    assert [repository for repository, _ in asked] == ["org/model"]
    patterns = " ".join(asked[0][1])
    assert "safetensors" in patterns and not any(
        ending in patterns for ending in (".bin", ".pt", ".ckpt", ".py", ".pkl", ".msgpack")
    )
    # what is on disk, or could be no id, is not asked of the hub
    (tmp_path / "org" / "model").mkdir(parents=True)
    for path in ("org/model", "nowhere", "./org/other", "a/b/c", str(tmp_path)):
        assert local_pipeline(path) == Path(path)
    assert len(asked) == 1


def test_an_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="org/model is no directory, and could not be had from"):
        local_pipeline("org/model")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and no connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_pipeline_in_the_hubs_cache(tiny_pipeline: Tiny, offline: Path) -> None:
    """The cache's own layout: blobs by checksum, a snapshot of links to them, and a reference."""
    source, home = tiny_pipeline("sd3m"), offline / "models--org--tiny-sd3"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    (home / "blobs").mkdir()
    for i, file in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        blob = shutil.copy(file, home / "blobs" / f"{i:040x}")
        link = home / "snapshots" / COMMIT / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert local_pipeline("org/tiny-sd3") == home / "snapshots" / COMMIT
    backbone = load_backbone("org/tiny-sd3", device="cpu", resolution=RESOLUTION)
    assert backbone.family == "sd3" and len(backbone.encode(["a cat"])) == 1


def test_an_id_that_is_not_in_the_cache(offline: Path) -> None:
    with pytest.raises(ValueError, match="could not be had from the hub") as error:
        load_backbone("org/absent", device="cpu")
    assert "\n" not in str(error.value)


PUBLISHED = ["clipscore", "pickscore", "hpsv2", "aesthetic", "image_reward", "geneval", "geneval2"]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.usefixtures("offline")
def test_a_reward_that_cannot_be_had_is_not_said_to_be_missing_on_disk(name: str) -> None:
    with pytest.raises(ValueError, match=r"the hub") as error:
        load_reward(name, path="org/model")
    assert "offline" in str(error.value).lower() or "connect" in str(error.value).lower()

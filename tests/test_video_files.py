"""Files of videos, and what a report shows of them."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiltflow.evaluation.pictures import grid, pixels_of
from tiltflow.models.medium import VIDEOS


@pytest.mark.parametrize("still", [0, 2, 5], ids=["moving", "half", "still"])
def test_a_file_of_a_video_holds_its_frames(tmp_path: Path, still: int) -> None:
    """Those that are as the one before, too: a student may have given up moving."""
    videos = torch.rand(2, 5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    videos[:, :still] = videos[:, :1]
    encoded = VIDEOS.encode(VIDEOS.rounded(videos))
    assert encoded.shape == (2, 5, 16, 24, 3)
    VIDEOS.save(encoded[0], tmp_path / "v.png")
    file: Any = Image.open(tmp_path / "v.png")
    assert file.n_frames == 5 and file.info["duration"] == pytest.approx(62.5)
    for k in range(5):
        file.seek(k)
        assert np.array_equal(np.asarray(file.convert("RGB")), encoded[0, k])


def test_a_report_plays_videos(tmp_path: Path) -> None:
    """Every second frame, shrunk, and not without an end."""
    videos = torch.linspace(0, 1, 9).view(1, 9, 1, 1, 1).expand(1, 9, 3, 300, 600)
    VIDEOS.save(VIDEOS.encode(VIDEOS.rounded(videos))[0], tmp_path / "v.png")
    seen = pixels_of(tmp_path / "v.png")
    assert seen.shape == (5, 128, 256, 3)
    [(prompt, [(system, link, width, height)])] = grid({"a": [seen]}, ["x"])
    assert (prompt, system, width, height) == ("x", "a", 256, 128)
    kind, data = link.split(";base64,")
    file: Any = Image.open(BytesIO(base64.b64decode(data)))
    assert kind == "data:image/webp" and file.n_frames == 5 and file.info["loop"] == 2
    for k in range(5):
        file.seek(k)
        assert np.allclose(np.asarray(file.convert("RGB")), seen[k], atol=3)
    assert seen[:, 0, 0, 0].tolist() == [0, 64, 128, 191, 255]

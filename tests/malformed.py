"""How malformed inputs are made and run; the inputs themselves are in malformed_*.py."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import shlex
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiltflow.cli import main as cli
from tiltflow.core.checkpoint import save_checkpoint
from tiltflow.core.disk import sha256

Make = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """An input in words, the command line, and what makes the files that it reads.

    `make` runs in an empty directory that holds `prompts.txt` and, with `model`, a copy of that
    tiny pipeline as `model`.
    """

    what: str
    line: str
    make: Make = lambda: None
    model: str | None = None


def text(name: str, content: str | bytes) -> Make:
    def make() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        Path(name).write_bytes(data)

    return make


def captions() -> Make:
    """Prompts that the reward `shapes` can read."""
    return text(
        "prompts.txt", "a red circle on black\na red circle left of an orange cross on black\n"
    )


def edit(name: str, **changes: Any) -> Make:
    """Keys of a JSON file set; `...` removes one."""

    def make() -> None:
        content = json.loads(Path(name).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        Path(name).write_text(json.dumps(kept))

    return make


def both(*makes: Make) -> Make:
    def make() -> None:
        for one in makes:
            one()

    return make


def remove(name: str) -> Make:
    def make() -> None:
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()

    return make


def cut(name: str, share: float = 0.5) -> Make:
    return lambda: os.truncate(name, int(os.path.getsize(name) * share))


class Planted:
    """What a pickle would run: it leaves a file behind."""

    def __reduce__(self) -> Any:
        return (open, ("planted", "w"))


def planted(name: str) -> Make:
    return text(name, pickle.dumps({"weight": Planted()}))


def header(name: str, table: Any, length: int | None = None, body: bytes = b"") -> Make:
    """A safetensors file with a header as one likes it."""
    raw = json.dumps(table).encode()
    return text(name, struct.pack("<Q", len(raw) if length is None else length) + raw + body)


def huge(name: str) -> Make:
    span = [0, 4 * 2**40]
    return header(name, {"w": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": span}})


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Make:
    def make() -> None:
        values = load_file(name)
        change(values)
        save_file(values, name, {"format": "pt"})

    return make


TRANSFORMER = "model/transformer/diffusion_pytorch_model.safetensors"
INDEX = TRANSFORMER + ".index.json"


def shard_index(target: str) -> Make:
    return both(
        remove(TRANSFORMER), text(INDEX, json.dumps({"weight_map": {"proj_out.weight": target}}))
    )


def run(stage: str = "cold_start", change: Callable[[Path], Any] = lambda path: None) -> Make:
    """A run directory with one checkpoint of step 3, which `change` gets."""

    def make() -> None:
        Path("run").mkdir()
        few_step = "model: {path: 'packaged:pipeline', few_step: x}\nrewards: {shapes: 1.0}\n"
        Path("run/config.yaml").write_text(
            "model: {path: 'packaged:pipeline'}\n" if stage == "cold_start" else few_step
        )
        with Path("run/config.yaml").open("a") as file:
            file.write(
                f"stage: {stage}\ndata: {{prompts: prompts.txt}}\nrun: {{out: run}}\n"
                "train: {steps: 3, batch_size: 24, generator_lr: 1e-4, fake_score_lr: 1e-4}\n"
            )
        weights = {"block.lora_A.weight": torch.ones(2, 3)}
        state = {"stage": stage, "adapters": None, "step": 3}
        groups = dict.fromkeys(("ema", "fake_score", "generator"), weights)
        change(save_checkpoint("run", 3, groups, state, keep=1))

    return make


def manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit(str(path / "manifest.json"), **changes)()


def plant_checkpoint(path: Path) -> None:
    """A pickle under a tensor file's name, with the manifest's checksum put right."""
    planted(str(path / "ema.safetensors"))()
    content = json.loads((path / "manifest.json").read_text())
    content["files"]["ema.safetensors"] = sha256(path / "ema.safetensors")
    (path / "manifest.json").write_text(json.dumps(content))


def lora(**weights: tuple[int, ...]) -> Make:
    """A LoRA folder with weights of such names and shapes, and no metadata."""

    def make() -> None:
        Path("lora").mkdir(exist_ok=True)
        values = {name.replace("__", "."): torch.zeros(shape) for name, shape in weights.items()}
        save_file(values, "lora/pytorch_lora_weights.safetensors")

    return make


CHANNELS = 3
"""Something in a module that is no reward; below are rewards that fail."""


def flat(images: Any, prompts: Any, metadata: Any) -> torch.Tensor:
    return images.flatten(1)


def endless(images: Any, prompts: Any, metadata: Any) -> torch.Tensor:
    return torch.full((len(images),), float("inf"))


def fails(images: Any, prompts: Any, metadata: Any) -> torch.Tensor:
    return images.mean((1, 2, 3)) + metadata[0]["tag"]


@contextlib.contextmanager
def at_most(extra: int) -> Iterator[None]:
    """Lets the process take so many bytes more and fails beyond, where the system counts them."""
    status = Path("/proc/self/status")
    if not status.is_file():
        yield
        return
    import resource

    line = next(one for one in status.read_text().splitlines() if one.startswith("VmSize"))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(line.split()[1]) * 1024 + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@dataclass(frozen=True)
class Outcome:
    """What the command line did: exit status, standard error, files that a pickle left behind."""

    status: int
    error: str
    planted: bool


def outcome(case: Case, folder: Path, models: Callable[[str], Path]) -> Outcome:
    """Runs a case in an empty folder. Paths in the error are relative to it."""
    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TILTFLOW_CACHE", str(folder / ".cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / ".hub"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setitem(sys.modules, "pyarrow", None)
        patch.setattr(logging, "raiseExceptions", False)
        Path("prompts.txt").write_text("a cat\na dog\n")
        if case.model:
            shutil.copytree(models(case.model), "model")
        case.make()
        patch.setattr(sys, "argv", ["tiltflow", *shlex.split(case.line)])
        status: Any = 0
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.main()
            except SystemExit as stop:
                status = stop.code
        left = Path("planted").exists()
    said = error.getvalue().replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
    return Outcome(int(status or 0), said, left)

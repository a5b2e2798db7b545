"""Checkpoints that no kill can tear: safetensors + JSON, written beside, then renamed.

    RUN/checkpoints/step-000100/   GROUP.safetensors …, state.json, manifest.json (checksums)
    RUN/checkpoints/latest         a file that names the newest whole one

A directory gets its `step-` name only when every byte of it is on disk, and `latest` moves only
after that. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tiltflow.core.disk import at_work, fsync, parse_json, save_tensors, sha256
from tiltflow.core.latest import (
    FORMAT,
    NAME,
    STEP,
    is_whole,
    latest_name,
    point_at,
    step_name,
    steps_in,
    verified,
)
from tiltflow.core.run_lock import held_by_another

_LEFTOVER = re.compile(r"\.(old|tmp)-\d+-")
MOMENTS = frozenset(("step", "exp_avg", "exp_avg_sq"))
"""What AdamW keeps of a parameter that it has stepped."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step`: groups of named CPU tensors, and JSON state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    good: int | None = None,
) -> Path:
    """Writes a checkpoint, points `latest` at it, and keeps the `keep` newest; its directory.

    The newest checkpoint of at most step `good` is kept as well.

    One process may save into a run directory at a time. A step that exists already is replaced
    (left alone where the content is the same).

    Raises:
        ValueError: on a negative step, keep < 1, a group name that is no file name, or state
            that JSON cannot hold.
        OSError: if the disk is full or fails; the earlier checkpoints are then as they were.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"cannot save step {step} keeping {keep}: need step >= 0 and keep >= 1")
    for group in tensors:
        if not NAME.fullmatch(group):
            raise ValueError(f"checkpoint group {group!r} is no file name")
    try:
        encoded = json.dumps(dict(state), allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"step {step}: JSON cannot hold the state to save ({error})") from error
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    temporary = folder / f".tmp-{os.getpid()}-{step_name(step)}"
    try:
        manifest = _write(temporary, step, tensors, encoded)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # what a full disk needs most
        raise _not_written(temporary, step, error) from error
    target = folder / step_name(step)
    _put(temporary, target, manifest)
    fsync(folder)
    point_at(folder, target.name)
    _retain(folder, keep, good)
    return target


def _write(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: str
) -> dict[str, Any]:
    """Every file of a checkpoint into the new directory `folder`, on disk; its manifest."""
    folder.mkdir()
    for group, values in tensors.items():
        save_tensors(_storable(values), folder / f"{group}.safetensors")
    (folder / "state.json").write_text(state, encoding="utf-8")
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "step": step, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        fsync(path)
    return manifest


def _not_written(temporary: Path, step: int, error: Exception) -> OSError:
    """What to raise where a checkpoint could not be written: the reason, and what there is."""
    # safetensors has an error of its own, with the system's number in its text.
    found = re.search(r"os error (\d+)", str(error))
    number = (error.errno if isinstance(error, OSError) else int(found[1]) if found else None) or 0
    reason = os.strerror(number) if number else str(error)
    whole = _alternative(temporary.parent, temporary)
    return OSError(
        number or errno.EIO, f"checkpoint of step {step} was not written ({reason}); {whole}"
    )


def point_latest(run_dir: str | Path, good: int) -> int:
    """Points `latest` at the newest checkpoint of at most step `good`; its step.

    Raises:
        ValueError: if there is none, or it is torn.
    """
    folder = Path(run_dir) / "checkpoints"
    step = next((step for step in steps_in(folder) if step <= good), None)
    if step is None:
        raise ValueError(f"{folder} has no checkpoint of step {good} or before")
    path = folder / step_name(step)
    try:
        verified(path)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} {error}") from error
    point_at(folder, path.name)
    return step


def load_checkpoint(run_dir: str | Path, which: str = "latest", tidy: bool = True) -> Checkpoint:
    """Reads `latest` or `step-XXXXXX` after verifying every checksum; tensors on the CPU.

    `tidy` removes what a killed save left behind, unless another process trains in the directory;
    of several readers one may do so, first.

    Raises:
        ValueError: if it is missing, torn or not ours, naming a whole one that exists.
    """
    folder = Path(run_dir) / "checkpoints"
    if tidy and os.access(folder, os.W_OK) and not held_by_another(Path(run_dir)):
        _sweep(folder)
    name = latest_name(folder) or which if which == "latest" else which
    path = folder / name
    try:
        if which != "latest" and not STEP.fullmatch(which):
            raise ValueError("is not called latest or step-XXXXXX")
        manifest = verified(path)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} {error}; {_alternative(folder, path)}") from error
    names = [name for name in manifest["files"] if name.endswith(".safetensors")]
    try:
        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in names}
        state = parse_json((path / "state.json").read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:  # the checksums are right: it was made so
        raise ValueError(f"checkpoint {path} is not tiltflow's: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} is not tiltflow's: its state is no JSON object")
    return Checkpoint(manifest["step"], tensors, state)


def latest_step(run_dir: str | Path) -> int | None:
    """The step of the latest checkpoint (`core.latest`), or None where nothing was saved."""
    name = latest_name(Path(run_dir) / "checkpoints")
    return None if name is None else int(name.removeprefix("step-"))


def _storable(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, which safetensors asks for."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in values.items():
        tensor = value.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    return ready


def _put(temporary: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Gives `temporary` its final name, replacing what has that name."""
    if target.exists():
        try:
            same = verified(target)["files"] == manifest["files"]
        except ValueError:
            same = False
        if same:
            shutil.rmtree(temporary)
            return
        # A directory cannot be renamed onto another: the old one steps aside, and `_sweep`
        # brings it back should a kill come between the two renames.
        os.replace(target, target.with_name(f".old-{os.getpid()}-{target.name}"))
    os.replace(temporary, target)


def _retain(folder: Path, keep: int, good: int | None) -> None:
    """Removes all but the newest `keep` checkpoints, the latest and the newest of at most step
    `good`. Later ones than the latest are of a branch that was left by going on from an earlier
    step: they are older than any of this one."""
    latest = latest_name(folder)
    steps = steps_in(folder)
    now = STEP.fullmatch(latest or "")
    if now is not None:
        steps.sort(key=lambda step: (step <= int(now[1]), step), reverse=True)
    kept = next((step for step in steps if good is not None and step <= good), None)
    for step in steps[keep:]:
        path = folder / step_name(step)
        if path.name != latest and step != kept:
            # Renamed first: a kill half-way through must not leave a torn checkpoint.
            doomed = folder / f".tmp-{os.getpid()}-drop-{path.name}"
            os.replace(path, doomed)
            shutil.rmtree(doomed)
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Removes what a killed save left behind, and nothing that a live process is writing. Others
    who read the run may do so at the same time: the ranks of stage 2, two commands."""
    leftovers = [path for path in folder.iterdir() if _LEFTOVER.match(path.name)]
    for path in leftovers:
        kind, owner, name = path.name.split("-", 2)
        if at_work(int(owner)):
            continue
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        elif kind == ".old" and not (folder / name).exists():
            with suppress(FileNotFoundError):
                os.replace(path, folder / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alternative(folder: Path, broken: Path) -> str:
    """Which whole checkpoint there is instead: the newest before `broken`, else the newest."""
    match = STEP.fullmatch(broken.name)
    limit = int(match[1]) if match else None
    steps = steps_in(folder)
    earlier = [step for step in steps if limit is not None and step < limit]
    for step in dict.fromkeys(earlier + steps):
        if is_whole(folder / step_name(step)):
            return f"{step_name(step)} is whole"
    return f"there is no whole checkpoint in {folder}"


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """A copy of the optimizer's state as `KEY.PARAMETER` (exp_avg.…, exp_avg_sq.…, step.…).

    `names` are the parameters' names in the optimizer's order. A parameter that was never
    stepped has no state.

    Raises:
        ValueError: if the number of names is not the number of parameters.
    """
    parameters = _parameters(optimizer, names)
    return {
        f"{key}.{name}": torch.as_tensor(value).detach().clone()
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_tensors` gave; learning rates and the like stay as they are.

    Raises:
        ValueError: if a saved parameter is unknown, its shape is another, or a part of what AdamW
            keeps of it is missing.
    """
    parameters = dict(zip(names, _parameters(optimizer, names), strict=True))
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if name not in parameters:
            raise ValueError(f"the saved optimizer state {key!r} belongs to no parameter here")
        shape = tuple(parameters[name].shape)
        if kind != "step" and tuple(tensor.shape) != shape:
            raise ValueError(
                f"the saved optimizer state {key!r} has shape {tuple(tensor.shape)}, not {shape}"
            )
        # A copy: the optimizer updates its state in place.
        state.setdefault(index[name], {})[kind] = tensor.clone()
    for i, kept in state.items():
        if kept.keys() != MOMENTS:
            lacks, odd = MOMENTS - kept.keys(), kept.keys() - MOMENTS
            wrong = f"lacks {min(lacks)}" if lacks else f"has {min(odd)}, which AdamW does not know"
            raise ValueError(f"the saved optimizer state of {names[i]!r} {wrong}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _parameters(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(parameters) != len(set(names)) or len(names) != len(set(names)):
        raise ValueError(
            f"the optimizer has {len(parameters)} parameters, but {len(set(names))} distinct names"
        )
    return parameters

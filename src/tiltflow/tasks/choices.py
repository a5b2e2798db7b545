"""How a student is sampled: by its export's contract, unless the command line says otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import load_file

from tiltflow.core.disk import parse_json
from tiltflow.core.latest import latest_name
from tiltflow.core.sentences import either
from tiltflow.core.sizes import Resolution, said
from tiltflow.formats.contract import Contract, read_contract
from tiltflow.models.lora_files import lora_file
from tiltflow.models.pipelines.directory import INDEX, Pipeline, Pipelines
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint, pipeline_fingerprint

Dtype = Literal["fp32", "bf16"]

OPTIONS = {
    "steps": "--steps",
    "eta": "--eta",
    "guidance": "--student-guidance",
    "resolution": "--resolution",
    "max_sequence_length": "--max-sequence-length",
}
"""What a contract settles, and the options that say otherwise."""

DEFAULTS: Mapping[str, Any] = {"steps": 4, "eta": 0.9}
"""Without a contract; what is not here is then the model's own."""


@dataclass(frozen=True)
class Choices:
    """Settled for one command. None in `resolution`, `max_sequence_length` and `guidance` (the
    student's) is the model's own. `notes` are lines for the user; `adapters` the fingerprints of
    the student's adapters by name, `weights` that of a full copy, as far as its contract has
    them."""

    steps: int
    eta: float
    guidance: float | None
    resolution: Resolution | None
    max_sequence_length: int | None
    dtype: Dtype
    notes: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    weights: str | None = None


def settle(
    asked: Mapping[str, Any],
    dtype: Dtype | None,
    pipelines: Pipelines,
    few_step: Path | None = None,
    tilt_lora: Path | None = None,
    sizes: Sequence[Resolution] = (),
) -> Choices:
    """What to sample with.

    `asked` has the keys of `OPTIONS`, None where the user did not say; `sizes` are what is sampled
    in the place of its resolution. The contract is the tilt's (whose student is sampled at last),
    else the few-step adapter's, else the merged pipeline's; without `dtype` the base is in the
    contract's, else in that of its files.

    Raises:
        ValueError: if a folder holds no LoRA, or a contract that cannot be read; or if there is
            a tilt without the few-step adapter.
    """
    if tilt_lora is not None and few_step is None:
        raise ValueError("--tilt-lora needs --few-step, the adapter that it was trained on")
    root, base = pipelines.model.root, pipelines.base
    below, above = (read_contract(f) if f is not None else None for f in (few_step, tilt_lora))
    merged = read_contract(root) if pipelines.model.has(INDEX) else None
    contract = above or below or merged
    notes = []
    if above and below and any(getattr(above, key) != getattr(below, key) for key in OPTIONS):
        notes.append("the two LoRAs were trained for different sampling: the tilt's is taken")
    values: dict[str, Any] = {key: asked.get(key) for key in OPTIONS}
    for key, value in values.items():
        trained = getattr(contract, key, None)
        if value is None:
            values[key] = DEFAULTS.get(key) if trained is None else trained
        elif contract and key == "steps":
            if value not in contract.trained_steps:
                several = either(contract.trained_steps)
                notes.append(f"--steps is {value}, but the student was trained for {several}")
        elif key != "resolution" and trained is not None and value != trained:
            notes.append(f"{OPTIONS[key]} is {value}, but the student was trained for {trained}")
    if contract:
        notes += _other_sizes(contract, sizes or [asked.get("resolution")])
        notes += _other_encoders(contract, pipelines.model)
    if contract and contract is not merged:
        notes += _other_base(contract, base)
    if above and few_step is not None:
        notes += _other_few_step(above, few_step)
    chosen = dtype or (contract.dtype if contract else files_dtype(base))
    hashes = {name: mark for name, mark in contract.hashes.items() if mark} if contract else {}
    said_so = tuple(f"warning: {note}" for note in notes)
    weights = contract.weights if contract else None
    return Choices(**values, dtype=chosen, notes=said_so, adapters=hashes, weights=weights)


def _other_sizes(contract: Contract, sizes: Sequence[Resolution | None]) -> list[str]:
    """A line if the student was not trained for one of the sizes that are asked for."""
    odd = [size for size in sizes if size is not None and size not in contract.trained_sizes]
    if not odd:
        return []
    option = "--size" if len(odd) > 1 or isinstance(odd[0], tuple) else OPTIONS["resolution"]
    asked, trained = (either([said(s) for s in each]) for each in (odd, contract.trained_sizes))
    return [f"{option} is {asked}, but the student was trained for {trained}"]


def _other_base(contract: Contract, base: Pipeline) -> list[str]:
    """A line if the LoRA was trained on other weights than those at hand."""
    if not base.has(INDEX):
        return []  # what is wrong with it is said when it is loaded
    here, there = pipeline_fingerprint(base), contract.base.hash
    if here == there:
        return []
    return [
        f"the LoRA was trained on {contract.base.name}, whose weights have the hash {there[:12]}, "
        f"but those in {base} have {here[:12]}"
    ]


def _other_encoders(contract: Contract, model: Pipeline) -> list[str]:
    """A line if the model at hand has other text encoders than the student was trained with: they
    are in no fingerprint, and what is absent is zeros in a prompt's conditioning."""
    if contract.absent is None or not model.has(INDEX):
        return []
    trained, here = set(contract.absent), set(model.absent_encoders)
    more, fewer = (" and ".join(sorted(names)) for names in (trained - here, here - trained))
    lines = [f"the student was trained without {more}, which {model} has"] if more else []
    return lines + ([f"the student was trained with {fewer}, which {model} lacks"] if fewer else [])


def base_of_start(few_step: Path) -> str | None:
    """The fingerprint of the base that stage 2's start was trained on: a run's, by its latest
    checkpoint, or an exported LoRA's. None where it is not said.

    Raises:
        ValueError: as `read_contract`, or if the checkpoint's state is no JSON.
    """
    folder = few_step / "checkpoints"
    name = latest_name(folder)
    if name is None:
        inner = few_step / "export" / "few_step"
        contract = read_contract(inner if inner.is_dir() else few_step)
        return contract.base.hash if contract else None
    state = parse_json((folder / name / "state.json").read_text(encoding="utf-8"))
    manifest = state.get("manifest") if isinstance(state, dict) else None
    if not isinstance(manifest, dict):
        return None
    return manifest.get("generator_base") or manifest.get("base")


def _other_few_step(tilt: Contract, folder: Path) -> list[str]:
    """A line if the tilt was trained on another few-step adapter than the one in `folder`."""
    trained = tilt.adapters.get("few_step")
    if trained is None or trained.hash is None:
        return []
    weights = {k.removeprefix("transformer."): v for k, v in load_file(lora_file(folder)).items()}
    if adapter_fingerprint(weights) == trained.hash:
        return []
    return [f"the tilt was trained on another few-step adapter than the one in {folder}"]


def files_dtype(pipeline: Pipeline) -> Dtype:
    """bf16 if the transformer's file holds that, else fp32, which holds everything.

    Raises:
        ValueError: as `Pipeline.index`.
    """
    assert pipeline.index is not None
    file = pipeline.root / "transformer" / pipeline.weight_files("transformer")[0]
    if not file.is_file():
        return "fp32"  # what is missing is said when it is loaded
    try:
        with safe_open(file, framework="pt") as opened:
            kinds = [opened.get_slice(name).get_dtype() for name in opened.keys()]  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{file} is torn or no safetensors file ({error})") from error
    return "bf16" if kinds.count("BF16") > len(kinds) / 2 else "fp32"

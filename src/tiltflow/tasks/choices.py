"""How a student is sampled: by its export's contract, unless the command line says otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from tiltflow.core.sentences import either
from tiltflow.core.sizes import Resolution, plain, said
from tiltflow.formats.contract import Contract, read_contract
from tiltflow.models.lora_files import adapter_keys, lora_mark
from tiltflow.models.pipelines.directory import INDEX, Pipeline, Pipelines
from tiltflow.models.pipelines.fingerprint import pipeline_fingerprint
from tiltflow.models.pipelines.limits import is_number, is_whole
from tiltflow.models.switch import FEW_STEP, TILT
from tiltflow.tasks.levels import own_levels

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
    them; `tilt` the strength of the tilt in what holds both adapters (a baked LoRA, a merged
    pipeline), None where they are apart; `levels` the noise levels that the student was trained at
    by the size's name, where the pipeline's scheduler gives others."""

    steps: int
    eta: float
    guidance: float | None
    resolution: Resolution | None
    max_sequence_length: int | None
    dtype: Dtype
    vae_dtype: Dtype | None = None
    """The autoencoder's, where it is not `dtype`."""
    notes: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    weights: str | None = None
    tilt: float | None = None
    levels: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


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
    else the few-step adapter's, else the merged pipeline's; a merged pipeline without one has its
    scheduler's steps, η and size. Without `dtype` the base is in the contract's, else in that of
    its files.

    Raises:
        ValueError: if a folder holds no LoRA, or a contract that cannot be read; or if there is
            a tilt without the few-step adapter, or a LoRA in the place of the other.
    """
    if tilt_lora is not None and few_step is None:
        raise ValueError("--tilt-lora needs --few-step, the adapter that it was trained on")
    root, base = pipelines.model.root, pipelines.base
    below, above = (read_contract(f) if f is not None else None for f in (few_step, tilt_lora))
    merged = read_contract(root) if pipelines.model.has(INDEX) else None
    contract, trained = above or below or merged, {}
    notes = _roles(few_step, below, tilt_lora, above) if few_step is not None else []
    if above and below and any(getattr(above, key) != getattr(below, key) for key in OPTIONS):
        notes.append("the two LoRAs were trained for different sampling: the tilt's is taken")
    if contract:
        trained = {key: getattr(contract, key) for key in OPTIONS}
        trained["several"] = contract.trained_steps
    elif few_step is None:
        trained = _of_scheduler(pipelines.model)
        notes += _no_contract(pipelines.model, trained)
    values, others = _values(asked, trained)
    notes += others
    levels: Mapping[str, tuple[float, ...]] = {}
    if contract:
        notes += _other_sizes(contract, sizes or [asked.get("resolution")])
        notes += _other_encoders(contract, pipelines.model)
    if contract and contract is not merged:
        moved, at = _other_base(contract, base), sizes or [values["resolution"]]
        levels, others = own_levels(contract, pipelines, values["steps"], at, moved=bool(moved))
        notes += [*moved, *others]
    return Choices(
        **values,
        dtype=dtype or (contract.dtype if contract else files_dtype(base)),
        vae_dtype=contract.vae_dtype if contract and dtype is None else None,
        notes=tuple(f"warning: {note}" for note in notes),
        adapters={n: mark for n, mark in contract.hashes.items() if mark} if contract else {},
        weights=contract.weights if contract else None,
        tilt=contract.tilt if contract else None,
        levels=levels,
    )


def _values(
    asked: Mapping[str, Any], trained: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What is asked for, else as it was trained, else by default; and a line for each that is
    asked for otherwise than it was trained, but for sizes."""
    values, notes = {key: asked.get(key) for key in OPTIONS}, []
    for key, value in values.items():
        own = trained.get(key)
        if value is None:
            values[key] = DEFAULTS.get(key) if own is None else own
        elif key == "steps" and own is not None:
            if value not in trained["several"]:
                several = either(trained["several"])
                notes.append(f"--steps is {value}, but the student was trained for {several}")
        elif key != "resolution" and own is not None and value != own:
            notes.append(f"{OPTIONS[key]} is {value}, but the student was trained for {own}")
    return values, notes


def _of_scheduler(model: Pipeline) -> dict[str, Any]:
    """What a merged pipeline's scheduler says of the student, by the keys of `OPTIONS`, and under
    `several` all its numbers of steps; empty where the scheduler is no student's."""
    file = "scheduler/scheduler_config.json"
    if not model.has(INDEX) or not model.has(file):
        return {}  # what is missing is said when it is loaded
    from tiltflow.scheduler import CPSFlowMatchScheduler

    config = model.json(file)
    if config.get("_class_name") != CPSFlowMatchScheduler.__name__:
        return {}
    eta, steps, size = (config.get(key) for key in ("eta", "steps", "size"))
    found: dict[str, Any] = {}
    several = steps if isinstance(steps, list) else [steps]
    if several and all(is_whole(number) for number in several):
        found |= {"steps": max(several), "several": tuple(several)}
    if is_number(eta):
        found["eta"] = eta
    if isinstance(size, list) and len(size) in (2, 3) and all(is_whole(side) for side in size):
        found["resolution"] = plain(*size)
    return found


def _no_contract(model: Pipeline, trained: Mapping[str, Any]) -> list[str]:
    """A line if a student is sampled by its scheduler alone."""
    if not trained:
        return []
    words = {"steps": "steps {}", "eta": "η {}", "resolution": "size {}"}
    own = [
        text.format(said(trained[key]) if key == "resolution" else trained[key])
        for key, text in words.items()
        if key in trained
    ]
    return [
        f"{model} has no contract.json: its scheduler says {', '.join(own)}, and the rest, such as "
        "the number of text tokens, is the model's own and may not be as the student was trained"
    ]


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


def _roles(
    few_step: Path, below: Contract | None, tilt_lora: Path | None, above: Contract | None
) -> list[str]:
    """Lines where the LoRAs are not those that the tilt's contract names.

    Raises:
        ValueError: if one is given in the place of the other, or one that holds both beside them.
    """
    contracts = [contract for contract in (above, below) if contract]
    if not contracts and tilt_lora is None:
        return []
    known = {mark: name for each in contracts for name, mark in each.hashes.items() if mark}
    first = lora_mark(few_step)
    if known.get(first) == TILT:
        raise ValueError(
            f"--few-step is {few_step}, which holds a tilt: it acts on the few-step adapter that "
            "it was trained on, so give that as --few-step, and the tilt as --tilt-lora"
        )
    if tilt_lora is None:
        return []
    if below and below.tilt:
        raise ValueError(
            f"--few-step is {few_step}, which has its tilt in it at {below.tilt:g}: give it "
            "without --tilt-lora"
        )
    if above and above.tilt is not None:
        raise ValueError(
            f"--tilt-lora is {tilt_lora}, which holds the few-step adapter too: give it alone, as "
            "--few-step"
        )
    second = lora_mark(tilt_lora)
    no_tilt = above is not None and bool(above.adapters) and TILT not in above.adapters
    if no_tilt or second == first or known.get(second) == FEW_STEP:
        raise ValueError(f"--tilt-lora is {tilt_lora}, which holds a few-step adapter and no tilt")
    trained = above.hashes if above else {}
    notes = []
    # of other programs' names the fingerprint is another one, and what the file says is taken
    said = below.hashes.get(FEW_STEP) if below else None
    here = said if adapter_keys(few_step) is None else first
    if None not in (here, trained.get(FEW_STEP)) and here != trained.get(FEW_STEP):
        notes.append(f"the tilt was trained on another few-step adapter than the one in {few_step}")
    if trained.get(TILT) not in (None, second) and adapter_keys(tilt_lora) is not None:
        notes.append(f"the weights in {tilt_lora} are not those of the tilt in its contract")
    return notes


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

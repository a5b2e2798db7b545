"""LoRA files read: a stage-1 adapter that a run starts from, and what a folder holds.

Other programs' LoRAs differ in more than their weights: α and rank by module, rank-stabilised
scales, modules left out. `read_adapter` gives an equal plain LoRA, of one rank and one α, or says
in a sentence what it cannot honour.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tiltflow.core.paths import misspelt
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint
from tiltflow.models.pipelines.headers import FLOATS, header
from tiltflow.models.pipelines.limits import is_number, is_whole, shown
from tiltflow.models.pipelines.weights import largest
from tiltflow.models.roles import AdapterSettings
from tiltflow.models.switch import FEW_STEP

PREFIX = "transformer."
ENCODERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.", "lora_te")
"""What the names of a text encoder's weights begin with, diffusers' and kohya's."""

HONOURED = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern",
)  # fmt: skip
"""Of a LoRA's metadata, what decides the matrix products: honoured exactly."""

PLACES = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""What restricts `target_modules`; the modules are then those that the file has weights of."""

WITHOUT_EFFECT = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "lora_dropout", "runtime_config", "qalora_group_size",
    "megatron_core", "loftq_config", "init_lora_weights",
)  # fmt: skip
"""What does not change a trained LoRA's products: where it comes from, how it was trained. All the
rest is refused by name, unless it is as PEFT has it by default."""

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa", "velora")
"""Beginnings of `init_lora_weights` that subtract the first adapter from the base."""


@dataclass(frozen=True)
class Module:
    """One adapted module: A (r, in), B (out, r) and what their product is multiplied by."""

    a: Tensor
    b: Tensor
    scale: float


def check_lora_file(file: Path) -> None:
    """Whether a LoRA is one of finite numbers, and of a transformer alone.

    Raises:
        ValueError: naming the weight that is not.
    """
    entries = header(file)
    for name in sorted(entries):
        if name.startswith(ENCODERS):
            raise ValueError(
                f"{file} has weights of a text encoder ({name}), which stays as it is here: give "
                "the transformer's LoRA alone"
            )
        if entries[name].dtype not in FLOATS:
            raise ValueError(
                f"{file} has {name} in {entries[name].dtype}, which is no floating-point type of "
                "16 bits or more"
            )
    with safe_open(file, framework="pt") as opened:
        for name in sorted(entries):
            value = opened.get_tensor(name)
            if value.numel() and not math.isfinite(largest(value)):
                raise ValueError(f"{file} has {name} with a value that is {largest(value)}")


def adapter_keys(folder: Path) -> set[str] | None:
    """The names of the weights in a LoRA folder as diffusers saves them; None in other formats."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        return None
    keys = set(header(files[0]))
    if not all(key.startswith(PREFIX) and ".lora_" in key for key in keys):
        return None
    return {key.removeprefix(PREFIX) for key in keys}


def count_pairs(folder: Path) -> int:
    """How many modules a LoRA folder's one file has a matrix A for, whatever the format."""
    return sum(
        key.endswith((".lora_A.weight", ".lora_down.weight")) for key in header(lora_file(folder))
    )


def read_adapter(folder: Path) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """A LoRA folder as settings and weights by canonical name; a run's is its exported one.

    A LoRA of one rank and one scale comes as it is. One whose modules differ, or whose scale is
    α/√r, comes as an equal one of the highest rank r and α = r: scales multiplied into B, ranks
    filled up with zeros.

    Raises:
        ValueError: if the folder holds no single LoRA of a transformer, one that does not say its
            α, or one with something in its metadata that cannot be honoured.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    file = lora_file(student_folder(folder))
    check_lora_file(file)
    with safe_open(file, framework="pt") as opened:
        raw = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
        weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    pairs, alphas = _pairs(file, weights)
    facts = _facts(file, raw)
    if facts is None and set(alphas) != set(pairs):
        raise ValueError(f"{file} says the α of its LoRA neither in metadata nor in .alpha tensors")
    modules = {
        name: Module(a, b, _scale(file, name, len(a), facts, alphas.get(name)))
        for name, (a, b) in pairs.items()
    }
    return _plain(modules, facts)


def _pairs(
    file: Path, weights: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """A and B by module, and the α of those that have a tensor of it.

    Raises:
        ValueError: if there is anything else.
    """
    found: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key in sorted(weights):
        match = re.fullmatch(r"transformer\.(.+)\.(lora_A\.weight|lora_B\.weight|alpha)", key)
        if match is None:
            raise ValueError(
                f"{file} is no plain LoRA of a transformer that tiltflow or diffusers saved: it "
                f"has {key}"
            )
        name, kind = match[1], match[2]
        if kind == "alpha":
            if weights[key].numel() != 1:
                raise ValueError(f"{file} has {key}, which is no single number")
            alphas[name] = float(weights[key])
        else:
            found.setdefault(name, {})[kind[5]] = weights[key]
    pairs = {}
    for name in sorted({*found, *alphas}):
        a, b = found.get(name, {}).get("A"), found.get(name, {}).get("B")
        if a is None or b is None:
            raise ValueError(f"{file} has only a part of the LoRA of {name}: one of its A and B")
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
            raise ValueError(
                f"{file} has A {tuple(a.shape)} and B {tuple(b.shape)} for {name}, which do not "
                "multiply to a matrix"
            )
        pairs[name] = (a, b)
    if not pairs:
        raise ValueError(f"{file} is no LoRA: it holds no weight")
    return pairs, alphas


def _facts(file: Path, raw: str | None) -> dict[str, Any] | None:
    """The transformer's part of a file's metadata, all of it understood; None if there is none.

    Raises:
        ValueError: naming what is not.
    """
    if raw is None:
        return None
    try:
        saved = json.loads(raw)
        prefixed = {k: v for k, v in saved.items() if k.startswith(PREFIX)}
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} has metadata that is no JSON object") from error
    facts = {key.removeprefix(PREFIX): value for key, value in prefixed.items()}
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    for key, value in sorted(facts.items()):
        init = str(value).lower() if key == "init_lora_weights" else ""
        plain = value in (None, False, [], {}) or value == usual.get(key)
        known = key in HONOURED or (key in WITHOUT_EFFECT and not init.startswith(BASE_CHANGING))
        if key == "peft_type" and value not in (None, "LORA"):
            known = plain = False
        if not known and not plain:
            raise ValueError(
                f"{file} has {key[:40]}: {shown(value)} in its metadata, which is not honoured here"
            )
    wrong = [
        key
        for key, right in (
            ("r", is_whole(facts.get("r")) and 0 < facts["r"] <= 65_536),
            ("lora_alpha", is_number(facts.get("lora_alpha"))),
            ("use_rslora", isinstance(facts.get("use_rslora", False), bool)),
            ("rank_pattern", _numbers(facts.get("rank_pattern"))),
            ("alpha_pattern", _numbers(facts.get("alpha_pattern"))),
            ("target_modules", _names(facts.get("target_modules"))),
        )
        if not right
    ]
    if wrong:
        value = shown(facts.get(wrong[0]))
        raise ValueError(f"{file} has {wrong[0]}: {value} in its metadata, which is none")
    return facts


def _numbers(pattern: Any) -> bool:
    """Whether it is a table of numbers by patterns of module names, or nothing."""
    if pattern is not None and not isinstance(pattern, dict):
        return False
    return all(is_number(value) and _compiles(key) for key, value in (pattern or {}).items())


def _names(targets: Any) -> bool:
    """Whether it is what PEFT takes as `target_modules`."""
    if isinstance(targets, str):
        return _compiles(targets)
    return isinstance(targets, list) and all(isinstance(name, str) for name in targets)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _scale(
    file: Path, name: str, rank: int, facts: Mapping[str, Any] | None, given: float | None
) -> float:
    """What a module's B A is multiplied by, as PEFT has it: α / r, or α / √r.

    Raises:
        ValueError: if the metadata have another rank or another α than the weights.
    """
    if facts is None:
        assert given is not None
        return given / rank
    from peft.utils.other import get_pattern_key

    ranks: dict[str, Any] = facts.get("rank_pattern") or {}
    alphas: dict[str, Any] = facts.get("alpha_pattern") or {}
    said = ranks.get(get_pattern_key(list(ranks), name), facts["r"])
    if said != rank:
        raise ValueError(f"{file} has rank {rank} for {name}, but {shown(said)} in its metadata")
    alpha = float(alphas.get(get_pattern_key(list(alphas), name), facts["lora_alpha"]))
    if given is not None and given != alpha:
        raise ValueError(f"{file} has α {given:g} for {name}, but {alpha:g} in its metadata")
    return alpha / math.sqrt(rank) if facts.get("use_rslora") else alpha / rank


def _plain(
    modules: Mapping[str, Module], facts: Mapping[str, Any] | None
) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """One rank and one α for all modules."""
    rank = max(len(module.a) for module in modules.values())
    scales = {module.scale for module in modules.values()}
    alike = len(scales) == 1 and all(len(module.a) == rank for module in modules.values())
    targets = facts["target_modules"] if facts else None
    if targets is None or (facts and any(facts.get(key) for key in PLACES)):
        targets = exactly(modules)
    weights = {}
    for name, module in modules.items():
        a, b, more = module.a, module.b, rank - len(module.a)
        if not alike:
            a = F.pad(a.float(), (0, 0, 0, more))
            b = F.pad(b.float() * module.scale, (0, more))
        weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = a, b
    if not alike:
        return AdapterSettings(rank, rank, targets), weights
    if facts and not facts.get("use_rslora") and not facts.get("alpha_pattern"):
        return AdapterSettings(rank, facts["lora_alpha"], targets), weights
    return AdapterSettings(rank, scales.pop() * rank, targets), weights


def exactly(names: Iterable[str]) -> str:
    """A pattern that these modules match, and no others."""
    return "|".join(re.escape(name) for name in sorted(names))


def student_folder(folder: Path) -> Path:
    """Where stage 1's LoRA lies: in a run directory the exported one, else the folder itself."""
    exported = folder / "export" / FEW_STEP
    return exported if exported.is_dir() else folder


def lora_mark(folder: Path) -> str:
    """The `adapter_fingerprint` of a LoRA's weights by their names in the transformer."""
    weights = {k.removeprefix(PREFIX): v for k, v in load_file(lora_file(folder)).items()}
    return adapter_fingerprint(weights)


def lora_file(folder: Path) -> Path:
    """The one LoRA file in a folder, after a look at its header.

    Raises:
        ValueError: if there is none, there are several, or it is torn or no safetensors file.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder of a LoRA that tiltflow exported")
    if not folder.is_dir():
        raise ValueError(f"there is no LoRA folder {folder}{misspelt(str(folder))}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        run = (folder / "config.yaml").is_file()
        hint = f": it is a run directory, whose LoRAs lie in {folder / 'export'}" if run else ""
        raise ValueError(f"{folder} holds no LoRA (no .safetensors file){hint}")
    if len(files) > 1:
        raise ValueError(f"{folder} should hold one LoRA file (.safetensors), not {len(files)}")
    header(files[0])
    return files[0]

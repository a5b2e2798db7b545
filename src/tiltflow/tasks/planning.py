"""What is `auto`, `model.gradient_checkpointing` and
`train.micro_batch_size`: the fastest plan that fits the device, kept in the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from tiltflow.config.load import RunConfig
from tiltflow.config.schema import AUTO, CHECKPOINTED
from tiltflow.core.disk import write_whole
from tiltflow.core.distributed import Ranks
from tiltflow.setup.planner import GIB, Plan
from tiltflow.tasks.plans import Plans, differentiated

FILE = "plan.json"
USED = 0.95
"""Of a device's memory, what a plan may take by its own count."""


def device_bytes(device: torch.device) -> float | None:
    """The memory of a run's device; None where it is not known."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu":
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return None


def is_auto(cfg: RunConfig) -> bool:
    """Whether a setting is left to the planner."""
    return _parts_are_open(cfg) or _size_is_open(cfg)


def _parts_are_open(cfg: RunConfig) -> bool:
    return cfg.model.gradient_checkpointing == AUTO


def _size_is_open(cfg: RunConfig) -> bool:
    return cfg.train.micro_batch_size == AUTO


def with_micro_batch(cfg: RunConfig, size: int) -> RunConfig:
    """The config with an open `train.micro_batch_size` at `size`, checked as a whole again."""
    if not _size_is_open(cfg):
        return cfg
    values = _values(cfg)
    values["train"]["micro_batch_size"] = size
    return RunConfig.model_validate_json(json.dumps(values))


def with_checkpointing(cfg: RunConfig, parts: tuple[str, ...], keep: bool = False) -> RunConfig:
    """The config with these parts recomputed, checked as a whole again; `keep` is what an open
    `tilt.keep_graph` becomes."""
    values = _values(cfg)
    values["model"]["gradient_checkpointing"] = list(parts)
    if _keep_is_open(cfg):
        values["tilt"]["keep_graph"] = keep
    return RunConfig.model_validate_json(json.dumps(values))


def _values(cfg: RunConfig) -> dict[str, Any]:
    other = "tilt" if cfg.stage == "cold_start" else "cold_start"
    return cfg.model_dump(mode="json", exclude={other})


def _keep_is_open(cfg: RunConfig) -> bool:
    return cfg.stage == "tilt" and cfg.tilt.keep_graph == AUTO


def choices(cfg: RunConfig) -> Iterator[tuple[str, ...]]:
    """What may be recomputed, the least work first; what the rest of the config refuses left out.

    Where they are not open they are what the config says.
    """
    if not _parts_are_open(cfg):
        yield tuple(sorted(cfg.model.checkpointed))
        return
    work = _recomputed(cfg)
    found = [parts for n in range(len(work) + 1) for parts in combinations(sorted(work), n)]
    for parts in sorted(found, key=lambda each: sum(work[part] for part in each)):
        try:
            with_checkpointing(cfg, parts)
        except ValueError:
            continue
        yield parts


def _recomputed(cfg: RunConfig) -> dict[str, float]:
    """What recomputing a part costs, in passes of the network an iteration.

    Of stage 1 the fake score's three and the generator's one in `generator_every`; of stage 2 the
    fake score's three an update and one a trained step of the generator. The decoder is less than a
    pass.
    """
    if cfg.stage == "cold_start":
        return {"fake_score": 3.0, "generator": 1 / cfg.cold_start.generator_every}
    return {
        "decoder": 0.5,
        "generator": differentiated(cfg),
        "fake_score": 3.0 * cfg.tilt.fake_score_updates,
    }


def _passes(cfg: RunConfig) -> float:
    """The network's passes an iteration that recomputes nothing; a backward pass through the frozen
    base counts as one. The fake score has three forward and three backward, the matching gradient
    three, a rollout of stage 1 on average (K + 1) / 2."""
    steps = cfg.sampler.boundaries / len(cfg.sampler.grids)
    if cfg.stage == "cold_start":
        return (steps + 1) / 2 + 6 + 5 / cfg.cold_start.generator_every
    return steps + 6 * cfg.tilt.fake_score_updates + 3 + 2 * differentiated(cfg)


FILL = 1.0
"""What a micro-batch costs beyond its samples, in samples: an assumption, which tells small ones
from recomputation. Launches wait for the host, and matrices are read anew."""


def sizes(cfg: RunConfig, rows: int) -> list[int]:
    """What an open `train.micro_batch_size` may be for a rank's `rows`, the largest first: all, and
    parts of them by halves; of stage 2 the group and its parts too, and what goes with it alone."""
    found, wanted = [], {-(-rows // 2**k) for k in range(rows.bit_length())} | {1}
    if cfg.stage == "tilt":
        group = cfg.tilt.group_size
        wanted |= {n for n in range(1, min(group, rows) + 1) if group % n == 0}
    for size in sorted(wanted, reverse=True):
        try:
            with_micro_batch(cfg, size)
        except ValueError:
            continue
        found.append(size)
    return found


def sized(
    cfg: RunConfig,
    memory: float | None,
    rows: int,
    planned: Callable[[RunConfig], Plan],
) -> RunConfig:
    """The config with an open `train.micro_batch_size` as in the fastest plan that fits `memory`,
    for a rank's `rows`; the smallest where none does, or where memory is not known."""
    if not _size_is_open(cfg):
        return cfg
    every = sizes(cfg, rows)
    if not cfg.model.has_files:
        return with_micro_batch(cfg, every[0])
    if memory is None:
        return with_micro_batch(cfg, every[-1])
    work, passes = _recomputed(cfg), _passes(cfg)
    best, least = every[-1], float("inf")
    for size in every:
        filled = rows + FILL * -(-rows // size)
        if passes * filled >= least:
            break  # nothing that comes can be faster
        parts, made = fastest(with_micro_batch(cfg, size), memory, planned)
        time = (passes + sum(work.get(part, 0.0) for part in parts)) * filled
        if made is not None and made.fits(USED * memory) and time < least:
            best, least = size, time
    return with_micro_batch(cfg, best)


def fastest(
    cfg: RunConfig, memory: float | None, planned: Callable[[RunConfig], Plan]
) -> tuple[tuple[str, ...], Plan | None]:
    """The parts to recompute in `memory` bytes, and the plan; all where memory is not known.

    Where nothing fits, the choice is the one that needs least: the run may be lucky, and the
    message of a run that is not says what else helps.
    """
    if not cfg.model.has_files:
        return (), None
    every = tuple(part for part in CHECKPOINTED if part != "decoder" or cfg.stage == "tilt")
    if not _parts_are_open(cfg):
        every = next(choices(cfg))
    if memory is None:
        return every, None
    made = None
    for parts in choices(cfg):
        made = planned(with_checkpointing(cfg, parts))
        if made.fits(USED * memory):
            return parts, made
    return every, made


def with_graphs(
    cfg: RunConfig,
    parts: tuple[str, ...],
    made: Plan | None,
    memory: float | None,
    planned: Callable[[RunConfig], Plan],
) -> tuple[RunConfig, Plan | None]:
    """The config with these parts recomputed, whose plan is `made`; and where `tilt.keep_graph` is
    `auto`, with the graphs kept if they fit as well."""
    plain = with_checkpointing(cfg, parts)
    if not _keep_is_open(cfg) or made is None or memory is None:
        return plain, made
    keeps = with_checkpointing(cfg, parts, keep=True)
    larger = planned(keeps)
    return (keeps, larger) if larger.fits(USED * memory) else (plain, made)


def chosen(
    cfg: RunConfig,
    out: Path,
    goes_on: bool,
    memory: float | None,
    ranks: Ranks,
    say: Callable[[str], None],
) -> RunConfig:
    """The config as it is built: `auto` replaced by the run's plan, or by a new one, in one line.

    A run that goes on has the plan that it began with, so that its numbers are the same. `memory`
    is of this rank's device; the plan, and its refusal, are one for all ranks: by the smallest.

    Raises:
        ValueError: if that needs more memory than the device has, unless `run.replan`.
    """
    if not is_auto(cfg):
        return cfg
    memory = _least(memory, ranks)
    kept = _kept(out) if goes_on else None
    if kept is not None and _size_is_open(cfg) and "micro_batch_size" not in kept:
        kept = None  # the run began with a size that was given
    if kept is not None and ranks.size < kept.get("ranks", 1):  # each has more of the batch now
        needed = Plans(cfg, ranks.size)(_by(kept, cfg)).peak
        kept = kept | {"bytes": needed, "memory": None}
    if kept is not None and not _too_large(kept, memory):
        return _by(kept, cfg)
    if kept is not None and not cfg.run.replan:
        assert memory is not None
        raise ValueError(
            f"the plan of {out} needs {kept['bytes'] / GIB:.1f} GiB and this device has "
            f"{memory / GIB:.1f} GiB: go on where it began, or give run.replan=true, which makes "
            "another plan"
        )
    opened, planned = cfg, Plans(cfg, ranks.size)
    size = sized(cfg, memory, -(-cfg.train.batch_size // ranks.size), planned).train.micro
    cfg = with_micro_batch(cfg, ranks.from_main(size))
    order = list(choices(cfg))
    parts, made = fastest(cfg, memory, planned)
    parts = order[ranks.from_main(order.index(parts))] if parts in order else parts
    built, made = with_graphs(cfg, parts, made, memory, planned)
    keep = bool(ranks.from_main(int(built.tilt.keep_graph is True)))
    built = with_checkpointing(cfg, parts, keep)
    again = "planned anew: " if kept is not None else ""
    say(f"{again}{sentence(opened, built, made, memory)}")
    if unknown := planned.models[1]:
        say(f"not counted, for its size is not known: {', '.join(unknown)}")
    if ranks.main:
        values: dict[str, Any] = {"gradient_checkpointing": list(parts), "keep_graph": keep}
        if _size_is_open(opened):
            values["micro_batch_size"] = cfg.train.micro
        values["bytes"] = made.peak if made is not None else 0
        values |= {"memory": memory, "ranks": ranks.size}
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / FILE, json.dumps(values, indent=1) + "\n")
    return built


def as_planned(cfg: RunConfig) -> RunConfig:
    """The config as the run in its directory was built: `auto` replaced by the kept plan, if there
    is one."""
    kept = _kept(Path(cfg.run.out)) if is_auto(cfg) else None
    if kept is None or (_size_is_open(cfg) and "micro_batch_size" not in kept):
        return cfg
    return _by(kept, cfg)


def _by(kept: dict[str, Any], cfg: RunConfig) -> RunConfig:
    """The config with what it leaves open as in a kept plan."""
    size = kept["micro_batch_size"] if _size_is_open(cfg) else cfg.train.micro
    parts = kept["gradient_checkpointing"] if _parts_are_open(cfg) else next(choices(cfg))
    return with_checkpointing(
        with_micro_batch(cfg, size), tuple(parts), kept.get("keep_graph", False)
    )


def _least(memory: float | None, ranks: Ranks) -> float | None:
    """The smallest of the ranks' devices; None where one of them is not known."""
    found = ranks.least(-1.0 if memory is None else memory)
    return None if found < 0 else found


def sentence(opened: RunConfig, built: RunConfig, made: Plan | None, memory: float | None) -> str:
    """What `opened` left open and `built` has, in one line."""
    said = []
    if _size_is_open(opened):
        said.append(f"micro_batch_size=auto is {built.train.micro}")
    if _parts_are_open(opened):
        parts = ", ".join(name for name in CHECKPOINTED if name in built.model.checkpointed)
        said.append(f"gradient_checkpointing=auto recomputes {parts or 'nothing'}")
    what = ", ".join(said)
    if _keep_is_open(opened) and built.tilt.keep_graph is True:
        what += " and keeps the rollout's graphs"
    if made is None or memory is None:
        return what
    return f"{what}: {made.peak / GIB:.1f} GiB of the device's {memory / GIB:.1f}"


def _kept(out: Path) -> dict[str, Any] | None:
    """The plan that the run in `out` began with."""
    file = out / FILE
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def _too_large(kept: dict[str, Any], memory: float | None) -> bool:
    """Whether a kept plan is for a larger device. Where nothing fitted, a run may have begun all
    the same, and goes on where it did. (Plans of earlier versions do not say where they were made.)
    """
    if memory is None or kept["bytes"] <= memory:
        return False
    made_in = kept.get("memory")
    return made_in is None or memory < made_in

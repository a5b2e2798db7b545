"""What a run says when the machine's limits end it: memory, disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from tiltflow.config.load import RunConfig
from tiltflow.config.schema import CHECKPOINTED
from tiltflow.core.allocation import out_of_memory
from tiltflow.core.checkpoint import latest_step
from tiltflow.tasks.planning import as_planned

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explained(cfg: RunConfig, ranks: int) -> Iterator[None]:
    """Turns running out of memory or disk into a sentence that says what helps.

    Raises:
        MemoryError: in place of the allocator's error, with the settings that need less.
        OSError: in place of a full disk's, with the checkpoint that is left.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = memory_advice(as_planned(cfg), ranks)  # `auto` by itself says nothing of now
        raise MemoryError(f"out of memory ({first}); {advice}") from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = os.strerror(error.errno)
        place = error.filename or cfg.run.out
        raise OSError(
            f"{error.strerror or reason} ({place}); {_left(Path(cfg.run.out))}"
        ) from error


def memory_advice(cfg: RunConfig, ranks: int) -> str:
    """The settings that need less memory and are not at their least yet, the best first."""
    train, model, tips = cfg.train, cfg.model, []
    rows = min(train.micro, -(-train.batch_size // ranks))
    if rows > 1:
        tips.append(f"train.micro_batch_size={rows // 2} (now {rows})")
    recomputed = set(CHECKPOINTED) - ({"decoder"} if cfg.stage == "cold_start" else set())
    if not recomputed <= model.checkpointed and model.has_files:
        tips.append("model.gradient_checkpointing=true")
    if cfg.stage == "cold_start" and cfg.cold_start.keep_graph:
        tips.append("cold_start.keep_graph=false")
    if cfg.stage == "tilt" and cfg.tilt.keep_graph is True:
        tips.append("tilt.keep_graph=false")
    chunk = cfg.tilt.decode_chunk or train.micro
    if cfg.stage == "tilt" and chunk > 1:
        tips.append(f"tilt.decode_chunk={chunk // 2} (now {chunk})")
    if model.dtype == "fp32":
        tips.append("model.dtype=bf16")
    if cfg.adapters.kind == "copies" and model.has_files:
        tips.append("adapters.kind=lora")
    elif ranks > 1 and cfg.run.sharding == "replicated" and model.base_storage is None:
        tips.append("run.sharding=fsdp2")
    if "model.gradient_checkpointing=true" not in tips and _base_can_shrink(cfg):
        tips.append("model.base_storage=fp8")
    if not tips:
        return "every setting that needs less memory is at its least: give it more, or more ranks"
    return f"try {', '.join(tips)}"


def _base_can_shrink(cfg: RunConfig) -> bool:
    lora = cfg.adapters.kind == "lora" and cfg.model.has_files and not cfg.model.compile
    return lora and cfg.run.sharding == "replicated" and cfg.model.base_storage is None


def _left(out: Path) -> str:
    step = latest_step(out)
    if step is None:
        return "nothing was saved yet: free some space and start again"
    return f"free some space and go on from step {step} with run.resume=true"


def resume_command(out: Path, ranks: int) -> str:
    """The command that goes on with a run, on the number of ranks that it had on this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    start = "tiltflow" if ranks == 1 else f"torchrun --nproc-per-node {here} -m tiltflow"
    return f"{start} train {quote(str(out / 'config.yaml'))} run.resume=true"

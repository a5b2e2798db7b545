"""A training over two ranks under torchrun, and the process of its second rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"


def torchrun(home: Path, *overrides: str) -> tuple[subprocess.Popen[bytes], int]:
    """The job, once its first metrics are written, and the pid of rank 1; it trains for ever, and
    what it says is in `said.txt`."""
    out, said = home / "run", home / "said.txt"
    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "-m", "tiltflow", "train", "mixture_cold_start", f"run.out={out}", "run.device=cpu",
        "train.steps=1000000", "log.every=5", "train.schedule=constant", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    with said.open("w") as file:
        job = subprocess.Popen(arguments, env=environment, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert job.poll() is None, said.read_text()
        time.sleep(0.1)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in workers}
    return job, next(int(pid) for pid, known in environments.items() if "RANK=1" in known)

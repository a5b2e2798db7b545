"""What 8 to 512 GPUs should reach, on paper: a sum of terms with its assumptions in this file.

An iteration takes T on one GPU (a fixed batch a GPU), the same work on every one, and ends when the
slowest is done. On top come the all-reduces of the adapters' gradients, the gather of the rewards,
the agreement to go on, and the draws, which a rank's host makes for its own rows. Nothing overlaps
with anything.

    python benchmarks/paper_model.py
"""

from __future__ import annotations

import math
import time

import torch
from support.tables import report

from tiltflow.models.pipelines.meta import META, meta_backbone
from tiltflow.models.roles import AdapterSettings, adapter_roles

NODE = 8
INSIDE, BETWEEN = 200e9, 25e9
"""Bytes a second that a GPU sends within a node, and of a node's link that it has to itself."""
HOP = 15e-6
"""Seconds of latency of one step of a ring or tree."""
AGREEMENT = 50e-6
"""Seconds of one step of the agreement over gloo, which goes through the hosts' network."""
SPREAD = 0.02
"""Standard deviation of a GPU's time for the same work, relative; independent of the others'."""
STAGES = {
    "stage 1": {"seconds": 2.0, "samples": 9, "reductions": 1.1, "rewards": 0, "draws": 6.1},
    "stage 2": {"seconds": 60.0, "samples": 144, "reductions": 2.0, "rewards": 4, "draws": 10.0},
}
"""T and samples a GPU; all-reduces an iteration (one of the fake score; of the generator every 10th
or each), rewards a sample, and latents drawn a sample, read off `train/`. T is an assumption for
SD3.5-M at 512 pixels."""
ELEMENTS = 16 * 64 * 64
SIZES = (8, 16, 32, 64, 128, 256, 512)


def adapter_bytes(model: str = "stabilityai/stable-diffusion-3.5-medium", rank: int = 32) -> int:
    """The fp32 gradients of one adapter on the model's default modules."""
    with META:
        backbone = meta_backbone(model, resolution=512)
        settings = AdapterSettings(rank, 2.0 * rank, backbone.lora_targets())
        parameters = adapter_roles(backbone, settings, seed=0).generator.parameters.values()
        return sum(4 * p.numel() for p in parameters)


def all_reduce(size: int, nbytes: float) -> float:
    """A ring within each node, one ring between the nodes on an eighth of the data a GPU."""
    inside, nodes = min(size, NODE), math.ceil(size / NODE)
    within = 2 * (inside - 1) / inside * nbytes / INSIDE + 2 * (inside - 1) * HOP
    across = 2 * (nodes - 1) / nodes * (nbytes / inside) / BETWEEN
    return within + (across + 2 * math.log2(nodes) * HOP if nodes > 1 else 0.0)


def draws_a_second(n: int = 1 << 24) -> float:
    """Normal draws a second of one CPU thread, measured here."""
    generator, began = torch.Generator().manual_seed(0), time.process_time()
    torch.randn(n, generator=generator)
    return n / (time.process_time() - began)


def slowest(size: int) -> float:
    """The expected maximum of `size` standard normal draws, by its integral."""
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    below = torch.special.ndtr(x) ** size
    return float(torch.trapezoid((x > 0).double() - below, x))


def main() -> None:
    nbytes, rate = adapter_bytes(), draws_a_second()
    print(f"an adapter's gradients: {nbytes / 1e6:.1f} MB; {rate / 1e6:.0f} million draws a second")
    rows = []
    for stage, given in STAGES.items():
        for size in SIZES:
            reduce = given["reductions"] * all_reduce(size, nbytes)
            batch = given["samples"] * size
            gather = all_reduce(size, 4.0 * given["rewards"] * batch) if given["rewards"] else 0.0
            agree = 2 * math.log2(size) * AGREEMENT
            wait = given["seconds"] * SPREAD * slowest(size)
            draw = given["draws"] * given["samples"] * ELEMENTS / rate
            terms = (reduce, gather, agree, wait, draw)
            efficiency = given["seconds"] / (given["seconds"] + sum(terms))
            rows.append([stage, size, *(1000 * t for t in terms), efficiency])
    columns = ["stage", "GPUs", "all-reduce, ms", "rewards, ms", "agreement, ms", "stragglers, ms"]
    columns += ["draws, ms", "efficiency"]
    report("paper_model", columns, rows, adapter_bytes=nbytes, draws_a_second=round(rate))


if __name__ == "__main__":
    main()

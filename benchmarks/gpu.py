"""Both stages at a real model's geometry on a GPU, with random weights: section by section.

Nothing is needed but torch, this repository (`PYTHONPATH=src`) and its dependencies. Each section
takes at most about two minutes, prints its lines and writes its part of `gpu.json` when it is done.

    python benchmarks/gpu.py [--only rate stage1 …] [--model sd35m|klein] [--out DIR]
                             [--set model.autocast=bf16 …] [--toy --device cpu]

`--set` is added to every stage's settings; `--toy` runs all sections on a small model anywhere.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from support.random_model import MODELS, RandomModel, random_model
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from tiltflow.models.pipelines.meta import META
from tiltflow.models.roles import adapter_roles
from tiltflow.setup.build import Build, adapter_settings
from tiltflow.setup.planner import GIB, _conditioning, _latents
from tiltflow.training.cold_start import ColdStart, Cycle
from tiltflow.training.loop import Hooks, LoopSettings, Skips, restore, save

EVERY = 10
"""Iterations of stage 1 to one generator update, as published."""
STOPS = (2, 3)
"""Rollout lengths that are timed: of these the mean is that of 1 to 4."""
CAP = 110.0
"""Seconds after which a section begins nothing new."""


@dataclass
class Bench:
    """What sections share: the model, their settings, and what was found so far."""

    model: RandomModel
    out: Path
    more: Sequence[str]
    batch: int
    found: dict[str, Any]
    began: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def late(self) -> bool:
        return time.perf_counter() - self.began > CAP

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall seconds of `run`, the device's work included."""
        self.sync()
        began = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - began

    def stage1(self, *more: str) -> Build:
        clear(self)  # of the build before, which hangs together in a circle
        sizes = [f"train.batch_size={self.batch}", f"train.micro_batch_size={self.batch}"]
        return self.model.build("cold_start", *sizes, *self.more, *more)

    def say(self, section: str, **values: Any) -> None:
        """One line, and the file as it is so far."""
        self.found.setdefault(section, []).append(values)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        print(section, json.dumps({k: v for k, v in shown.items() if k != "detail"}), flush=True)
        (self.out / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")

    def rate(self) -> float:
        """FLOP a second of a large bf16 product on random data: measured once."""
        if "rate" not in self.found:
            rate(self)
        return float(self.found["rate"][0]["flop_per_s"])


# ---- the sections


def rate(bench: Bench) -> None:
    """The matrix rate that shares are of."""
    n = 8192 if bench.cuda else 512
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times = [bench.seconds(lambda: [torch.mm(a, b, out=out) for _ in range(10)]) for _ in range(5)]
    bench.say("rate", flop_per_s=10 * 2 * n**3 / sorted(times)[2], n=n)


def stage1(bench: Bench) -> None:
    """The recipe as it is: samples a second, memory against the plan, useful share; and of one
    fake-score iteration the launches, copies and kernels by name."""
    build = timed(bench, "stage1", "recipe")
    if build is not None:
        profiled(bench, "profile", build)


def options(bench: Bench) -> None:
    """The recipe with each option on its own, and together."""
    plain, by_hand = "model.gradient_checkpointing=false", "model.graphs=false"
    every = "model.gradient_checkpointing=true"
    for name, more in {
        "by hand, no checkpointing": [by_hand, plain],
        "by hand, checkpointing": [by_hand, every],
        "recorded, checkpointing": ["model.graphs=auto", every],
        "by hand, autocast, no checkpointing": [by_hand, plain, "model.autocast=bf16"],
    }.items():
        if bench.late():
            bench.say("options", name=name, skipped="no time left")
        else:
            timed(bench, "options", name, *more)


def host(bench: Bench) -> None:
    """Where the host spends one fake-score iteration, in Python functions."""
    build = bench.stage1()
    steps = steps_of(build, False)
    for step in steps:
        build.stage.iteration(step)
    seen = cProfile.Profile()
    seen.runcall(lambda: (build.stage.iteration(steps[0]), bench.sync()))
    text = io.StringIO()
    pstats.Stats(seen, stream=text).sort_stats("tottime").print_stats(60)
    (bench.out / "host.txt").write_text(text.getvalue())
    bench.say("host", calls=sum(e.callcount for e in seen.getstats()), table="host.txt")


def graphs(bench: Bench) -> None:
    """One pass of the network, launched and replayed as a CUDA graph: what launching costs."""
    if not bench.cuda:
        bench.say("graphs", skipped="no CUDA")
        return
    build = bench.stage1("model.gradient_checkpointing=false")
    roles, device = build.stage.roles, bench.device
    random = torch.Generator(device).manual_seed(5)
    for rows in (bench.batch, 2 * bench.batch):
        picked = [i % len(build.prompts) for i in range(rows)]
        cond, _ = build.prompts.select(picked, device)
        x = torch.randn(rows, *build.backbone.latent_shape, device=device, generator=random)
        sigma = torch.full((rows,), 0.5, device=device)

        def forward(x: Tensor = x, sigma: Tensor = sigma, cond: Any = cond) -> Tensor:
            with torch.no_grad():
                return roles.generator(x, sigma, cond)

        def both(x: Tensor = x, sigma: Tensor = sigma, cond: Any = cond) -> None:
            roles.fake_score(x, sigma, cond).square().sum().backward()

        for name, run in {"forward": forward, "forward and backward": both}.items():
            eager = [bench.seconds(run) for _ in range(4)]
            clear(bench)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    run()
                replay = min([bench.seconds(graph.replay) for _ in range(4)][1:])
            except RuntimeError as error:
                bench.say("graphs", name=name, rows=rows, failed=str(error)[:200])
                return
            bench.say("graphs", name=name, rows=rows, eager=min(eager[1:]), replay=replay)
            del graph
            clear(bench)


def resume(bench: Bench) -> None:
    """Whether a run that was saved, built anew and gone on with has the same bits."""
    more = ["cold_start.generator_every=2"]
    settings = LoopSettings(steps=4)
    ends = {}
    for name in ("uninterrupted", "again"):
        build = bench.stage1(*more)
        for step in range(4):
            if step == 2 and name == "uninterrupted":
                save(build.stage, bench.model.folder, 2, settings, Skips(0), Hooks())
            build.stage.iteration(step)
        ends[name] = digest(build)
    build = bench.stage1(*more)
    from tiltflow.core.checkpoint import load_checkpoint

    done = restore(build.stage, load_checkpoint(bench.model.folder), settings, Skips(0))
    for step in range(done, 4):
        build.stage.iteration(step)
    ends["resumed"] = digest(build)
    first = ends["uninterrupted"]
    for name in ("again", "resumed"):
        apart = {k: float((first[k] - v).abs().max()) for k, v in ends[name].items()}
        equal = all(torch.equal(first[k], v) for k, v in ends[name].items())
        bench.say("resume", name=name, bit_equal=equal, largest_gap=max(apart.values()))


def stage2(bench: Bench) -> None:
    """Stage 2 at 24 images in groups of 12, its passes recorded and by hand."""
    for name, graphs in {"recorded": "auto", "by hand": "false"}.items():
        if bench.late():
            bench.say("stage2", name=name, skipped="no time left")
        else:
            epochs(bench, name, graphs)


def epochs(bench: Bench, name: str, graphs: str) -> None:
    batch, group, micro = (24, 12, 12) if not bench.model.toy else (4, 2, 2)
    reset_peak(bench)
    build = bench.model.build(
        "tilt",
        f"train.batch_size={batch}",
        f"train.micro_batch_size={micro}",
        f"tilt.group_size={group}",
        f"model.graphs={graphs}",
        *bench.more,
    )
    times: list[float] = []
    while len(times) < 3 and not bench.late():
        times.append(bench.seconds(lambda: build.stage.iteration(len(times))))
    epoch = min(times[1:] or times)
    bench.say(
        "stage2",
        name=name,
        epoch=epoch,
        first=times[0],
        samples_per_s=batch / epoch,
        peak_gib=peak(bench),
        failures=[str(e) for e in build.stage.guard.failures()],
    )


def compiled(bench: Bench) -> None:
    """`model.compile`: two iterations of each kind in a fresh process, cold and then cached."""
    cache = Path(tempfile.mkdtemp())
    for name in ("cold", "cached"):
        command = [sys.executable, __file__, "--only", "compiled_child", "--out", str(bench.out)]
        command += ["--model", bench.model.name, "--device", str(bench.device)]
        command += ["--batch", str(bench.batch), "--json", f"compiled-{name}.json"]
        command += ["--toy"] if bench.model.toy else []
        command += ["--set", *bench.more, "model.compile=true"]
        began = time.perf_counter()
        try:
            subprocess.run(
                command,
                timeout=80 if name == "cold" else 40,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
                check=False,
            )
            told = json.loads((bench.out / f"compiled-{name}.json").read_text())
            bench.say("compiled", name=name, whole=time.perf_counter() - began, **told)
        except (subprocess.TimeoutExpired, OSError, ValueError) as error:
            bench.say("compiled", name=name, failed=type(error).__name__)
            break
    shutil.rmtree(cache, ignore_errors=True)


def compiled_child(bench: Bench) -> None:
    build = bench.stage1()
    plan = [*steps_of(build, False), *steps_of(build, True)]
    first = {step: bench.seconds(lambda s=step: build.stage.iteration(s)) for step in plan}  # type: ignore[misc]
    then = {step: bench.seconds(lambda s=step: build.stage.iteration(s)) for step in plan}  # type: ignore[misc]
    bench.found["child"] = {
        "build": sum(first.values()) - sum(then.values()),
        "fake": (then[plan[0]] + then[plan[1]]) / 2,
        "generator": (then[plan[2]] + then[plan[3]]) / 2,
    }


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "rate": rate,
    "stage1": stage1,
    "graphs": graphs,
    "options": options,
    "host": host,
    "resume": resume,
    "stage2": stage2,
    "compiled": compiled,
}


# ---- how they measure


def steps_of(build: Build, generator: bool) -> list[int]:
    """The first iteration of each length in `STOPS` that updates the generator, or does not."""
    stage = build.stage
    assert isinstance(stage, ColdStart)
    found = {}
    for step in range(400):
        (stop,) = stage.stops(Cycle.of(step, 1, EVERY))
        if ((step + 1) % EVERY == 0) == generator and stop not in found:
            found[stop] = step
    return [found[stop] for stop in STOPS]


def timed(bench: Bench, section: str, name: str, *more: str) -> Build | None:
    """Stage 1: seconds of both kinds of iteration, samples a second, memory and useful share."""
    build = bench.stage1(*more)
    kinds = {"fake": steps_of(build, False), "generator": steps_of(build, True)}
    reset_peak(bench)
    try:
        first = bench.seconds(lambda: build.stage.iteration(kinds["fake"][1]))
        build.stage.iteration(kinds["generator"][1])
        seconds: dict[str, float] = {}
        for kind, steps in kinds.items():
            each = [
                sorted(bench.seconds(lambda s=s: build.stage.iteration(s)) for _ in range(2))[0]  # type: ignore[misc]
                for s in steps
            ]
            seconds[kind] = sum(each) / len(each)
    except torch.OutOfMemoryError:
        bench.say(section, name=name, failed="out of memory")
        return None
    mean = ((EVERY - 1) * seconds["fake"] + seconds["generator"]) / EVERY
    cfg = bench.model.config(
        "cold_start",
        f"train.batch_size={bench.batch}",
        f"train.micro_batch_size={bench.batch}",
        *bench.more,
        *more,
    )
    planned = bench.model.planned(cfg).peak / GIB
    used, needed = peak(bench), useful(bench, cfg)
    bench.say(
        section,
        name=name,
        fake=seconds["fake"],
        generator=seconds["generator"],
        first=first,
        mean=mean,
        samples_per_s=bench.batch / mean,
        useful_tflop=needed / 1e12,
        useful_share=needed / mean / bench.rate(),
        peak_gib=used,
        planned_gib=planned,
        peak_of_plan=used / planned,
        failures=[str(e) for e in build.stage.guard.failures()],
    )
    return build


def useful(bench: Bench, cfg: Any) -> float:
    """FLOP that an iteration of stage 1 needs, recomputation not counted, counted on shapes.

    Of the fake score three forward and backward passes (two transitions), the rollout 2.5 forward;
    of the generator's update the teacher's two, the fake score's one, its own there and back, and
    2.5 for the boundary samples of its own (`cold_start.fresh_boundary`).
    """
    if "useful" in bench.found:
        return float(bench.found["useful"][0]["flop"])
    backbone = bench.model.shapes(cfg)
    with META:
        roles = adapter_roles(backbone, adapter_settings(cfg, backbone), seed=0)
    x, cond = _latents(backbone, 1), _conditioning(backbone, 1)
    sigma = torch.empty(1, device=META)
    counts = []
    for grad in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            out = roles.fake_score(x, sigma, cond)
            if grad:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    forward, both = counts
    fake = 2.5 * forward + 3 * both
    own = 2.5 if cfg.cold_start.fresh_boundary else 0
    flop = bench.batch * (fake + ((3 + own) * forward + both) / EVERY)
    bench.say("useful", flop=flop, forward=forward, forward_and_backward=both)
    return flop


LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")


def profiled(bench: Bench, section: str, build: Build) -> None:
    """One fake-score iteration of a stage that has run before."""
    steps = steps_of(build, False)
    build.stage.iteration(steps[0])
    bench.sync()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if bench.cuda else []
    with torch.profiler.profile(activities=kinds) as seen:
        wall = bench.seconds(lambda: build.stage.iteration(steps[0]))
    calls: dict[str, list[float]] = {}
    kernels: dict[str, list[float]] = {}
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        on_device = event.device_type() == DeviceType.CUDA
        if on_device and event.name().startswith("Optimizer."):  # a span over kernels
            continue
        table = kernels if on_device else calls
        entry = table.setdefault(event.name(), [0, 0.0])
        entry[0] += 1
        entry[1] += event.duration_ns() / 1e6
    launched = {n: int(v[0]) for n, v in calls.items() if n in LAUNCHES or "GraphLaunch" in n}
    moved = {n: int(v[0]) for n, v in calls.items() if n.startswith(("cudaMemcpy", "cudaMemset"))}
    waits = {n: int(v[0]) for n, v in calls.items() if "Synchronize" in n}
    top = sorted(kernels.items(), key=lambda item: -item[1][1])
    ops = sorted(calls.items(), key=lambda item: -item[1][0])
    bench.say(
        section,
        stop=STOPS[0],
        wall=wall,
        host_launches=sum(launched.values()),
        launched=launched,
        memory=moved,
        waits=waits,
        kernels=sum(int(v[0]) for v in kernels.values()),
        busy=sum(v[1] for v in kernels.values()) / 1e3,
        operations=sum(int(v[0]) for n, v in calls.items() if n.startswith("aten::")),
        detail={"kernels": top[:60], "calls": ops[:80]},
    )
    lines = [f"{v[1]:9.2f} ms {int(v[0]):6d}  {name[:150]}" for name, v in top[:60]]
    lines += [f"{int(v[0]):6d}  {name}" for name, v in ops[:80]]
    (bench.out / f"{section}.txt").write_text("\n".join(lines) + "\n")


def digest(build: Build) -> dict[str, Tensor]:
    """All that a checkpoint of the stage would hold, in main memory."""
    tables = {**build.stage.roles.state()}
    for name, updater in build.stage.updaters.items():
        tables[f"optimizer_{name}"] = updater.state()
    return {
        f"{k}/{n}": v.detach().float().cpu().clone()
        for k, t in tables.items()
        for n, v in t.items()
    }


def reset_peak(bench: Bench) -> None:
    clear(bench)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()


def peak(bench: Bench) -> float:
    return torch.cuda.max_memory_allocated() / GIB if bench.cuda else 0.0


def clear(bench: Bench) -> None:
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()


@contextmanager
def told(bench: Bench, name: str) -> Iterator[None]:
    """One section: what fails is written down, and the next one goes on."""
    bench.began = time.perf_counter()
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        bench.say("failed", name=name, error=f"{type(error).__name__}: {error}"[:500])
    bench.say("took", name=name, seconds=time.perf_counter() - bench.began)
    clear(bench)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    every = [*SECTIONS, "compiled_child"]
    parser.add_argument("--only", nargs="+", choices=every, default=list(SECTIONS))
    parser.add_argument("--model", choices=MODELS, default="sd35m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--json", help="where compiled_child writes")
    parser.add_argument("--set", nargs="*", default=[], dest="more")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    with (
        tempfile.TemporaryDirectory() as folder,
        random_model(args.model, device, args.toy, Path(folder)) as model,
    ):
        bench = Bench(model, args.out, args.more, args.batch, {})
        if args.only == ["compiled_child"]:
            compiled_child(bench)
            (args.out / args.json).write_text(json.dumps(bench.found["child"]))
            return
        name = torch.cuda.get_device_name() if bench.cuda else "CPU"
        bench.say("machine", device=name, torch=torch.__version__, more=args.more)
        for section in args.only:
            with told(bench, section):
                SECTIONS[section](bench)


if __name__ == "__main__":
    main()

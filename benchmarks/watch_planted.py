"""Does the watch work: a planted reward that is easy to hack trips it, the demo's recipe does not.

`demo_tilt` as it is for several seeds, then with the mean brightness of the image as its reward at
a large weight, all from one stage-1 run; the planted one is looked at more often unless told
otherwise (`--planted-every`). It must raise an alarm before a held-out reward has fallen by a tenth
of the gain that the default recipe brings it; the default runs must raise none. Runs that are there
already are read and not repeated.

    python benchmarks/watch_planted.py [--few-step runs/demo/cold_start] [--seeds 5]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tiltflow.config.load import load_config
from tiltflow.core.checkpoint import latest_step
from tiltflow.evaluation.statistics import standard_error
from tiltflow.evaluation.watch.history import Measurement, read_history
from tiltflow.evaluation.watch.rules import judge
from tiltflow.evaluation.watch.settings import WatchRules
from tiltflow.tasks.train import run_training

ALLOWED = 0.1
"""The share of the gain that a held-out reward may have lost at the alarm."""


def brightness(images, prompts, metadata):  # type: ignore[no-untyped-def]
    """The mean of all pixels: an all-white image is the best one."""
    return images.mean((1, 2, 3))


brightness.differentiable = True  # type: ignore[attr-defined]


def run(out: Path, few_step: Path, overrides: Sequence[str]) -> list[Measurement]:
    """One stage-2 run, gone on with where it was stopped; what its watch saw."""
    given = [f"run.out={out}", f"model.few_step={few_step}", "run.resume=auto", *overrides]
    cfg = load_config("demo_tilt", given)
    if latest_step(out) != cfg.train.steps:
        run_training(cfg, Console())
    return judged(read_history(out / "watch.jsonl"))


def show(name: str, history: Sequence[Measurement]) -> None:
    """Every series of a run as means relative to the first measurement, and the alarms."""
    start = history[0]
    names = [n for n in start.values if not n.startswith("teacher/")]
    print(f"== {name}\n{'step':>5} " + " ".join(f"{n.split(':')[-1][-22:]:>22}" for n in names))
    for seen in history:
        cells = []
        for n in names:
            change = seen.values[n] - start.values[n]
            cells.append(f"{seen.mean(n):10.4f} ({change.mean():+.4f})".rjust(22))
        print(f"{seen.step:5d} " + " ".join(cells))
        for text in seen.alarms.values():
            print(f"      alarm: {text}")
    sys.stdout.flush()


def judged(history: Sequence[Measurement]) -> list[Measurement]:
    """The measurements with the alarms of today's rules, whichever the run was watched by."""
    trained = [n.partition("/")[2] for n in history[0].values if n.startswith("trained/")]
    weights = dict.fromkeys(trained, 1.0)
    return [
        replace(seen, alarms=judge(history[: i + 1], WatchRules(), weights) if i else {})
        for i, seen in enumerate(history)
    ]


def held_out(history: Sequence[Measurement]) -> list[str]:
    return [n for n in history[0].values if n.startswith("held_out/")]


def gains(runs: Sequence[Sequence[Measurement]]) -> dict[str, float]:
    """By held-out reward, the default recipe's gain: the highest mean less the first, over runs."""
    return {
        name: float(np.mean([max(m.mean(name) for m in h) - h[0].mean(name) for h in runs]))
        for name in held_out(runs[0])
    }


def planted_result(history: Sequence[Measurement], gain: dict[str, float]) -> dict[str, Any]:
    """The first alarm, and how far each held-out reward had fallen from its highest mean then.

    A reward of which the least change of one sample is above the allowed fall has no
    `share_of_gain`.
    """
    first = next((m for m in history if m.alarms), None)
    if first is None:
        return {"alarm": None, "caught": False}
    falls = {}
    for name in held_out(history):
        best = max((m for m in history if m.step <= first.step), key=lambda m: m.mean(name))
        fall = best.values[name] - first.values[name]
        size = np.abs(fall[fall != 0]).min(initial=np.inf) / len(fall)  # of one sample's change
        fine = gain[name] > 0 and (ALLOWED * gain[name] >= size or not fall.any())
        falls[name] = {
            "fall": float(fall.mean()),
            "standard_error": standard_error(fall, first.clusters(fall))[0],
            "gain_of_default": gain[name],
            "share_of_gain": float(fall.mean()) / gain[name] if fine else None,
            "fall_at_end": best.mean(name) - history[-1].mean(name),
        }
    shares = [f["share_of_gain"] for f in falls.values() if f["share_of_gain"] is not None]
    return {
        "alarm": first.step,
        "rules": sorted(first.alarms),
        "falls": falls,
        "caught": bool(shares) and max(shares) < ALLOWED,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few-step", type=Path, default=Path("runs/demo/cold_start"))
    parser.add_argument("--runs", type=Path, default=Path("runs/watch_planted"))
    parser.add_argument("--seeds", type=int, default=5, help="runs of the default recipe")
    parser.add_argument("--planted-seeds", type=int, default=1)
    parser.add_argument("--every", type=int, default=25, help="steps between measurements")
    parser.add_argument("--planted-every", type=int, default=5, help="the same, planted runs")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--weight", type=float, default=20.0, help="planted tilt.reward_weight")
    parser.add_argument("--steps", type=int, help="instead of the recipe's, for a trial")
    parser.add_argument("--out", type=Path, default=Path("docs/data/watch_planted.json"))
    parser.add_argument("overrides", nargs="*", help="further settings of all runs, KEY=VALUE")
    args = parser.parse_args()
    if not (args.few_step / "checkpoints" / "latest").exists():
        run_training(load_config("demo_cold_start", [f"run.out={args.few_step}"]), Console())
    common = [f"watch.every={args.every}", f"watch.prompts={args.prompts}", *args.overrides]
    common += [f"train.steps={args.steps}"] if args.steps else []
    default = []
    for seed in range(args.seeds):
        seeded = [*common, f"run.seed={seed}"]
        default.append(run(args.runs / f"default_{seed}", args.few_step, seeded))
        show(f"default, seed {seed}", default[-1])
    planted = [
        *common,
        f"watch.every={args.planted_every}",
        "rewards={'watch_planted:brightness': 1.0}",
        f"tilt.reward_weight={args.weight}",
    ]
    gain, results = gains(default), []
    for seed in range(args.planted_seeds):
        history = run(args.runs / f"planted_{seed}", args.few_step, [*planted, f"run.seed={seed}"])
        show(f"planted, seed {seed}", history)
        results.append(planted_result(history, gain))
    false = [{m.step: dict(m.alarms) for m in h if m.alarms} for h in default]
    every = {"default": args.every, "planted": args.planted_every}
    settings = {"every": every, "prompts": args.prompts, "weight": args.weight}
    report = {"settings": settings, "false_alarms": false, "gain": gain, "planted": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    good = not any(false) and all(result["caught"] for result in results)
    print(json.dumps(report, indent=1))
    print(f"default runs with an alarm: {sum(map(bool, false))} of {len(default)}")
    print("the planted reward was caught in time" if good else "NOT as it should be")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""`tiltflow study`: rows of settings × seeds, trained on equal budgets and scored alike.

Each cell lies in OUT/ROW/seed-N: its run, and `result.json`, which is there when the cell is done.
So a study can be made in pieces, by several processes, and goes on after a kill.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tiltflow.config.load import RunConfig, dump_config, load_config
from tiltflow.config.recipe_source import parse_yaml, read_recipe
from tiltflow.core.checkpoint import latest_step
from tiltflow.core.disk import write_whole
from tiltflow.core.paths import nearest
from tiltflow.evaluation.chunks import Chunks
from tiltflow.rewards.base import Reward
from tiltflow.rewards.files import of_servers
from tiltflow.setup.costing import within
from tiltflow.setup.manifest import defaults_by_key
from tiltflow.tasks.callbacks import SILENT, Callbacks
from tiltflow.tasks.depends import asked
from tiltflow.tasks.evaluate import evaluate
from tiltflow.tasks.request import Request
from tiltflow.tasks.run import Run
from tiltflow.tasks.study_content import trained_content
from tiltflow.tasks.study_file import Study
from tiltflow.tasks.train import train_run
from tiltflow.training.changes import by_key, filled

RESULT = "result.json"
ASKED = "asked.json"
"""What a cell's run is trained with, in its folder from before the first iteration on: a run whose
result is not written yet says so by it alone."""
CONTENT = ("scored.content.", "content.")
"""Begin the keys of what files hold that is scored by and trained from. Earlier versions kept none,
and other machines may not have the files: where one side has no such key, nothing is known against
the other."""


@dataclass(frozen=True)
class Cell:
    """One row of a study with one seed, in its folder."""

    study: Study
    out: Path
    row: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.out / self.row / f"seed-{self.seed}"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def start(self) -> Cell | None:
        """The cell that this one's run starts from."""
        name = self.study.rows[self.row].start
        return None if name is None else Cell(self.study, self.out, name, self.seed)

    @cached_property
    def config(self) -> RunConfig:
        """The settings of its run, but for how long it is.

        Raises:
            ValueError: naming the row whose settings are wrong.
        """
        row, stages = self.study.rows[self.row], self.study.stages
        stage = read_recipe(row.recipe).get("stage")
        if stage not in stages:
            raise ValueError(f"row {self.row!r}: stages has no {stage}, which {row.recipe} is of")
        changes = self.study.set | stages[stage].set | row.set
        changes |= {"run.seed": self.seed, "run.out": str(self.run)}
        if self.start is not None:
            changes["model.few_step"] = str(self.start.run)
        given = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        try:
            return load_config(row.recipe, [*given, "run.resume=auto"])
        except ValueError as error:
            raise ValueError(f"row {self.row!r}: {error}") from error

    @property
    def budget(self) -> int:
        """Its network evaluations, at most."""
        return self.study.rows[self.row].budget or self.study.stages[self.config.stage].budget

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What its result depends on, wherever it lies, by dotted key."""
        run = self.config.run.model_copy(update={"out": "", "resume": False})
        model = self.config.model.model_copy(update={"few_step": None})
        plain = self.config.model_copy(update={"run": run, "model": model})
        scored = self.study.model_dump(
            mode="json", include={"prompts", "split", "columns", "first", "count", "noise",
                                  "rewards", "diversity", "batch",
                                  *(["steps"] if self.study.steps else [])},
        )  # fmt: skip
        found = parse_yaml(dump_config(plain), "settings")
        scored["content"] = self.study.content
        found |= {"budget": self.budget, "scored": scored}
        start = None if self.start else self.config.model.few_step
        if content := trained_content(self.config, None if start is None else Path(start)):
            found["content"] = content
        return by_key(found if self.start is None else {**found, "start": self.start.asked})

    @property
    def trained_with(self) -> dict[str, Any]:
        """What its run depends on of `asked`. What is scored may change until there is a result."""
        return {k: v for k, v in self.asked.items() if not _of_start(k).startswith("scored.")}

    def result(self) -> dict[str, Any] | None:
        """What it came to; None where it is not done.

        Raises:
            ValueError: if the file is torn, or is of other settings than the study's now.
        """
        path = self.folder / RESULT
        return self._kept(path, "result", self.asked) if path.is_file() else None

    def check_run(self) -> None:
        """That what is trained of its run is so with the study's settings now. A run without a
        checkpoint begins anew, and one of an earlier version has not said: neither is refused.

        Raises:
            ValueError: if it is of others, or what it says is torn.
        """
        path = self.folder / ASKED
        if path.is_file() and latest_step(self.run) is not None:
            self._kept(path, "record", self.trained_with)

    def begin(self) -> None:
        """Writes what its run is trained with, for `check_run`, which comes before.

        Raises:
            ValueError: as `check_run`.
        """
        self.check_run()
        text = json.dumps({"asked": self.trained_with}, allow_nan=False) + "\n"
        write_whole(self.folder / ASKED, text)

    def _kept(self, path: Path, what: str, now: Mapping[str, Any]) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            of: dict[str, Any] = dict(kept["asked"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no {what} of a study") from error
        if found := _another(of, now):
            raise ValueError(
                f"{path} is of other settings than the study has now ({found}): remove "
                f"{self.folder}, or give another --out"
            )
        return kept


def _of_start(key: str) -> str:
    """A key of `asked`, or of those of the cell that it starts from, as that cell has it."""
    return key.removeprefix("start.")


def _another(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting that is another, "key: old → new". What the version that made a result
    had no setting for was as its default is; of `CONTENT` it may have known nothing."""
    defaults = defaults_by_key()
    old = filled(before, now, defaults | {f"start.{key}": v for key, v in defaults.items()})
    for key in dict.fromkeys([*now, *old]):
        if _of_start(key).startswith(CONTENT) and not (key in old and key in now):
            continue
        was, given = json.dumps(old.get(key)), json.dumps(now.get(key))
        if was != given:
            return f"{key}: {was} → {given}"
    return None


def cells_of(
    study: Study, out: Path, rows: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Cell]:
    """The cells of some rows and seeds (all, where none are named), in the study's order.

    Raises:
        ValueError: if a row is none of the study's, or no row has a seed.
    """
    for name in rows:
        if name not in study.rows:
            raise ValueError(f"--rows: there is no row {name!r}{nearest(name, list(study.rows))}")
    chosen = [name for name in study.rows if not rows or name in rows]
    for seed in seeds:
        if not any(seed in study.seeds_of(name) for name in chosen):
            raise ValueError(f"--seeds: no row of these has the seed {seed}")
    return [
        Cell(study, out, name, seed)
        for name in chosen
        for seed in study.seeds_of(name)
        if not seeds or seed in seeds
    ]


def make_cells(
    file: Path,
    cells: Sequence[Cell],
    jobs: int = 1,
    callbacks: Callbacks = SILENT,
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Makes the cells that are not done, and first those that they start from; whether all are
    done, which they are not where one was stopped.

    Raises:
        ValueError: if a cell fails, or a result or a run is of other settings.
    """
    starts = {c.start.folder: c.start for c in cells if c.start is not None}
    first = [*starts.values(), *(c for c in cells if c.start is None and c.folder not in starts)]
    for cell in (*first, *cells):
        cell.config  # noqa: B018  # settings are wrong before the first run, not after it
    for cell in (*first, *cells):
        cell.check_run()
    lost = {c.start.folder: c.start for c in cells if c.start is not None and c.result() is None}
    if not all(make_cell(c, callbacks, say) for c in lost.values() if _lacks_run(c)):
        return False
    for wave in (first, [c for c in cells if c.start is not None]):
        todo = [cell for cell in wave if cell.result() is None]
        if jobs > 1 and len(todo) > 1:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda cell: _elsewhere(file, cell, jobs, say), todo))
        elif not all(make_cell(cell, callbacks, say) for cell in todo):
            return False
        if any(cell.result() is None for cell in wave):
            return False
    return True


def _lacks_run(cell: Cell) -> bool:
    """Whether a cell's result is kept and its run is not, or not whole."""
    found = cell.result()
    if found is None:
        return False
    return not ((cell.run / "config.yaml").is_file() and _trained(Run(cell.run), found["steps"]))


def make_cell(cell: Cell, callbacks: Callbacks, say: Callable[[str], None]) -> bool:
    """Trains and scores one cell, from where it was; whether it is done. Of one that is done, a run
    that is not there is trained again, for others to start from."""
    cfg = cell.config
    steps, cost = within(cfg, cell.budget)
    say(f"{cell.row}, seed {cell.seed}: {steps} iterations, {cost.evaluations:,} evaluations")
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"steps": steps})})
    cell.begin()
    run = Run(cell.run) if (cell.run / "config.yaml").is_file() else None
    if run is None or not _trained(run, steps):
        run = Run(train_run(cfg, callbacks))
    if not _trained(run, steps):
        return False
    if cell.result() is not None:
        return True
    result = {
        "asked": cell.asked,
        "row": cell.row,
        "seed": cell.seed,
        "stage": cfg.stage,
        "steps": steps,
        "cost": asdict(cost),
    }
    every = cell.study.steps
    parts = {k: cell.folder / (f"parts-{k}" if every else "parts") for k in every or (None,)}
    found = {k: _scored(_request(cell, k), callbacks, place) for k, place in parts.items()}
    result |= {"at": {str(k): one for k, one in found.items()}} if every else found[None]
    write_whole(cell.folder / RESULT, json.dumps(result, allow_nan=False) + "\n")
    for place in parts.values():
        shutil.rmtree(place, ignore_errors=True)
    return True


def _scored(request: Request, callbacks: Callbacks, place: Path) -> dict[str, Any]:
    """A student's scores on every prompt; its batches that are done lie in `place`."""
    chunks, servers = Chunks(place, asked(request)), dict[str, str]()

    def begin(rewards: Mapping[str, Reward]) -> None:
        chunks.also(of_servers(rewards, "contents"))
        servers.update(of_servers(rewards, "lasting"))

    found = evaluate(request, callbacks, take=chunks.take, alone=True, begin=begin)
    ((name, scores),) = found.scores.items()
    system = found.summary["systems"][name]
    return {
        "nfe": system["nfe"],
        "vendi": system.get("vendi"),
        **{key: found.summary[key] for key in ("diversity_in",) if key in found.summary},
        **({"servers": servers} if servers else {}),
        "scores": {reward: values.tolist() for reward, values in scores.items()},
    }


def _trained(run: Run, steps: int) -> bool:
    """Whether a run has come to its end, and its export, where it has one, is written."""
    exports = run.config.model.has_files and run.config.adapters.kind == "lora"
    return run.step == steps and (run.export is not None or not exports)


def _request(cell: Cell, steps: int | None) -> Request:
    """Its student, to be scored in `steps` steps, None being its own; of a model without files the
    runs themselves."""
    cfg, study = cell.config, cell.study
    model, tilted = cfg.model, cfg.stage == "tilt"
    few_step, tilt = cell.run / "export" / "few_step", cell.run / "export" / "tilt"
    if not model.has_files:
        assert cell.start is not None or not tilted
        few_step, tilt = (cell.start.run if cell.start else cell.run), cell.run
    return Request(
        model=model.path,
        prompts=study.scored(),
        few_step=few_step,
        tilt_lora=tilt if tilted else None,
        steps=steps,
        seed=study.noise,
        batch=study.batch,
        device=cfg.run.device,
        autocast=model.autocast,
        generator_path=model.generator_path,
        family=model.family,
        cache=cfg.data.cache,
        rewards=dict.fromkeys(study.rewards),
        diversity=study.diversity,
    )


def _elsewhere(file: Path, cell: Cell, jobs: int, say: Callable[[str], None]) -> None:
    """The cell in a process of its own, with its share of the cores; what it says goes to a file.

    Raises:
        ValueError: if it fails, with its last line.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    command = [sys.executable, "-m", "tiltflow", "study", str(file), "--out", str(cell.out)]
    command += ["--rows", cell.row, "--seeds", str(cell.seed), "--cells-only"]
    log = cell.folder / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as to:
        environment: Mapping[str, str] = os.environ | {"OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(
            command, stdout=to, stderr=to, env=environment, check=False
        ).returncode
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code:
        raise ValueError(f"{cell.row}, seed {cell.seed}: {lines[-1] if lines else code} ({log})")
    say(f"{cell.row}, seed {cell.seed}: done")

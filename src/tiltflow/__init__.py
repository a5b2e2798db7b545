"""Turns a flow-matching text-to-image model into a 4-step generator, and tilts it towards rewards.

    import tiltflow

    config = tiltflow.load_recipe("demo_cold_start", run={"out": "runs/a"})
    run = tiltflow.train(config)

The names below are the interface (docs/python.md). Each is imported when it is first used, so that
`import tiltflow` waits for no library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiltflow.config.load import RunConfig
    from tiltflow.evaluation.scores import Evaluation
    from tiltflow.scheduler import CPSFlowMatchScheduler
    from tiltflow.tasks.callbacks import Callbacks
    from tiltflow.tasks.interface import (
        Sampling,
        compare,
        evaluate,
        export,
        load_recipe,
        recipes,
        register,
        sample,
        train,
    )
    from tiltflow.tasks.run import Run

    __version__: str

_HOMES = {
    "CPSFlowMatchScheduler": "scheduler",
    "Callbacks": "tasks.callbacks",
    "Evaluation": "evaluation.scores",
    "Run": "tasks.run",
    "RunConfig": "config.load",
    "Sampling": "tasks.interface",
    "compare": "tasks.interface",
    "evaluate": "tasks.interface",
    "export": "tasks.interface",
    "load_recipe": "tasks.interface",
    "recipes": "tasks.interface",
    "register": "tasks.interface",
    "sample": "tasks.interface",
    "train": "tasks.interface",
}

__all__ = [
    "CPSFlowMatchScheduler",
    "Callbacks",
    "Evaluation",
    "Run",
    "RunConfig",
    "Sampling",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "load_recipe",
    "recipes",
    "register",
    "sample",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tiltflow")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    with import_module(f"{__name__}.core.importing").large_imports():
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

# The networks of the tests are too small for threads to pay, and `make test` has a process a core.
# Child processes see it too: bits depend on the number of threads. Torch reads it on import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = tuple(
    f"test_{name}.py"
    for name in (
        "mixture_training", "families_ranks", "families_training", "buckets", "compiled", "submit",
        "study", "demo_loop", "interface", "kills_embedded", "distributed", "export_workflow",
    )
)  # fmt: skip
"""The files that take longest: begun first, so that all processes end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """The test files import every library: a million objects that stay. The garbage collector took
    15 of test_train's 168 CPU seconds, and need not look through them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random pipeline by name; each is built once a session.

    Read-only for tests: copy it to change it.
    """
    built: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in built:
            # diffusers takes seconds to import, which tests without pipelines need not wait for
            import tiny_pipelines

            built[name] = tiny_pipelines.build(name, tmp_path_factory.mktemp(name))
        return built[name]

    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Embeddings go into a directory of this session, for child processes too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILTFLOW_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A real browser, for a module with the marks `chromium.NEEDED`."""
    from chromium import launched

    with launched() as opened:
        yield opened


@pytest.fixture
def compiler() -> Iterator[None]:
    """torch's compiler without what it has compiled, and with its limits, which compilation raises
    for the whole process, as they were afterwards. (monkeypatch takes them away for good.)"""
    import torch
    import torch._functorch.config

    config = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    torch._dynamo.reset()
    buffers = torch._functorch.config.donated_buffer
    with config.patch({name: getattr(config, name) for name in names}):
        yield
    torch._functorch.config.donated_buffer = buffers

"""A real browser for the tests of pages, and what holds for every page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium")
NEEDED = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]
"""The marks of a module that opens it."""


@contextmanager
def launched() -> Iterator[Any]:
    """The browser itself; the fixture `browser` of conftest.py has one for a module."""
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def opened(browser: Any, size: tuple[int, int]) -> Iterator[tuple[Any, list[str]]]:
    """An empty page of that width and height, and what its console and its errors will say."""
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page, said
    context.close()


class Kept:
    """Requests of a page that do not go out before they are let go. Asked for before the page is
    opened: an open one's requests are caught only some time after `page.route` has returned."""

    def __init__(self, page: Any, pattern: str) -> None:
        assert page.url == "about:blank"
        self.page, self.pattern = page, pattern
        self.routes: list[Any] = []
        page.route(pattern, lambda route: self.routes.append(route))  # playwright needs a function

    def wait(self) -> Any:
        """The first of them, once it is there."""
        for _ in range(3000):
            if self.routes:
                return self.routes[0]
            self.page.wait_for_timeout(10)
        raise TimeoutError(f"the page has not asked for {self.pattern}")


def check_access(page: Any) -> None:
    """No serious finding of axe-core."""
    found = axe.Axe().run(page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert serious == [], [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in serious]

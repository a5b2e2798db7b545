"""`make docs`: the site builds, and a broken link or a bare public name does not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build_site
import pytest
import recipe_memory

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`*])")


def sentences(page: Path) -> list[str]:
    """The sentences of a page's running text; tables, code, headings and figures are none."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    found: list[str] = []
    for block in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", text):
        if (
            not block.strip()
            or block.lstrip("\n")[0] in "#|<!"
            or block.startswith(("    ", "\n    "))
        ):
            continue
        plain = re.sub(r"\]\([^)]*\)", "]", " ".join(block.split()))
        found += [part for part in SENTENCE.split(plain) if len(part.split()) > 2]
    return found


def median_words(page: Path) -> int:
    lengths = sorted(len(each.split()) for each in sentences(page))
    return lengths[len(lengths) // 2]


PAGES = [p for p in sorted((build_site.ROOT / "docs").glob("*.md")) if p.name != "errors.md"]


@pytest.mark.parametrize("page", [build_site.ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_a_page_has_short_sentences(page: Path) -> None:
    """The median has at most 18 words; the studies in docs/lab are logs, and not held to it."""
    assert median_words(page) <= 18


def test_a_public_name_without_a_docstring_is_named(tmp_path: Path) -> None:
    package = tmp_path / "tiltflow"
    package.mkdir()
    (package / "__init__.py").write_text('"""Doc."""\n')
    (package / "flow.py").write_text('"""Doc."""\n\ndef bare(x): ...\n\ndef _own(x): ...\n')
    (package / "scheduler.py").write_text('"""Doc."""\n')
    with pytest.raises(ValueError, match=r"without a docstring: tiltflow\.flow\.bare$"):
        build_site.interface(tmp_path)


def test_the_tables_of_memory_are_those_of_the_planner() -> None:
    """`python scripts/recipe_memory.py --table` writes it."""
    figures = json.loads(recipe_memory.DATA.read_text(encoding="utf-8"))
    recipes = {p.stem for p in recipe_memory.RECIPES.glob("*.yaml")}
    assert set(figures) == {n for n in recipes if n.startswith(tuple(recipe_memory.MODELS))}
    assert recipe_memory.cards(figures) in recipe_memory.README.read_text(encoding="utf-8")
    assert recipe_memory.table(figures) in recipe_memory.PAGE.read_text(encoding="utf-8")


@pytest.mark.long
def test_the_site_builds_and_a_broken_link_fails(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    wanted = ("docs", "src", "scripts", "examples", "README.md", "CHANGELOG.md", "zensical.toml")
    copy.mkdir()
    for name in wanted:
        place = build_site.ROOT / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, copy / name)
    command = [sys.executable, "scripts/build_site.py"]
    subprocess.run(command, cwd=copy, check=True)
    assert (copy / "site" / "index.html").exists()
    with (copy / "docs" / "demo.md").open("a") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    assert subprocess.run(command, cwd=copy, check=False).returncode != 0

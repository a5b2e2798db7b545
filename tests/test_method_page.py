"""Every "METHOD §n" in the repository leads to a section of docs/method.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "method.md"
CITED = re.compile(r"METHOD\s+((?:§\d+(?:[,–]| and)?\s*)+)")
PLACES = ("src", "tests", "docs", "benchmarks", "scripts", "examples")


def cited() -> dict[int, Path]:
    """Every section that some file cites, with one of the files."""
    files = [ROOT / "README.md"]
    for place in PLACES:
        files += [p for end in ("py", "md", "yaml") for p in (ROOT / place).rglob(f"*.{end}")]
    found: dict[int, Path] = {}
    for path in files:
        for match in CITED.finditer(path.read_text(encoding="utf-8")):
            numbers = [int(n) for n in re.findall(r"§(\d+)", match[1])]
            for first, last in re.findall(r"§(\d+)–§(\d+)", match[1]):
                numbers += range(int(first), int(last) + 1)
            found |= dict.fromkeys(numbers, path)
    return found


def test_every_cited_section_is_there() -> None:
    headings = {int(n) for n in re.findall(r"^## (\d+)\. ", PAGE.read_text(), re.M)}
    sections = cited()
    assert {1, 2, 3, 4, 5, 6, 8, 9} <= set(sections)
    missing = {n: path for n, path in sections.items() if n not in headings}
    assert not missing


def test_equations_are_numbered_once_and_cited_ones_exist() -> None:
    text = PAGE.read_text()
    defined = re.findall(r" {2,}\((\d\.\d)\)$", text, re.M)
    assert len(defined) == len(set(defined))
    assert {f"({n})" for n in re.findall(r"\((\d\.\d)\)", text)} == {f"({n})" for n in defined}

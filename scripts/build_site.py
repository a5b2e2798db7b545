"""Builds the documents' site into `site/`: the pages, the interface from its docstrings, one check.

    python scripts/build_site.py

Fails on a broken link (zensical's strict mode) and on a public name without a docstring.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
STAGE = ROOT / "build" / "site_pages"
PUBLIC = ("tiltflow", "tiltflow.flow", "tiltflow.scheduler")
"""The modules whose names others use."""
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "src/tiltflow/assets/README.md": "embedded_model.md",
}
LINK = re.compile(r"(\]\(|src=\")([^)\s\"#]+)")


def public_names(package: griffe.Module) -> Iterator[tuple[str, griffe.Object]]:
    """Each public name by the path that a reader imports it from."""
    for path in PUBLIC:
        module = package if path == package.path else package[path.split(".", 1)[1]]
        yield path, module
        for name, member in module.members.items():
            own = not name.startswith("_") and not member.is_alias
            if name not in module.exports if module.exports else not own:
                continue
            if isinstance(member, griffe.Alias) and not member.target_path.startswith("tiltflow."):
                continue  # another library's name, which has its own pages
            found = member.final_target if isinstance(member, griffe.Alias) else member
            if found.is_class or found.is_function:
                yield f"{path}.{name}", found


def interface(source: Path = ROOT / "src") -> str:
    """The page of public names of the package in `source`, in their order.

    Raises:
        ValueError: naming every one that has no docstring.
    """
    package = griffe.load("tiltflow", search_paths=[source])
    assert isinstance(package, griffe.Module)
    parts, bare = ["# Python interface\n"], []
    for path, thing in public_names(package):
        if thing.docstring is None:
            bare.append(path)
            continue
        level = "##" if thing.is_module else "###"
        signature = f"```python\n{thing.signature()}\n```\n\n" if thing.is_function else ""
        text = thing.docstring.value.replace("Raises:\n", "Raises:\n\n")
        parts.append(f"\n{level} `{path}`\n\n{signature}{text}\n")
    if bare:
        raise ValueError(f"public names without a docstring: {', '.join(bare)}")
    return "".join(parts)


def staged(page: Path) -> Path:
    """Where a page of the repository stands among the site's."""
    name = page.relative_to(ROOT).as_posix()
    return STAGE / MOVED.get(name, name.removeprefix("docs/"))


def with_links(page: Path) -> str:
    """A page with its links to files of the repository as they are on the site.

    Raises:
        ValueError: naming a link that leads nowhere.
    """

    def moved(match: re.Match[str]) -> str:
        if "://" in match[2]:
            return match[0]
        target = (page.parent / match[2]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            raise ValueError(f"{page.relative_to(ROOT)} links to {match[2]}, which is no file here")
        there, here = staged(target), staged(page).parent
        if not there.exists():  # an example, say: the site has a copy
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, there)
        return match[1] + Path(os.path.relpath(there, here)).as_posix()

    return LINK.sub(moved, page.read_text(encoding="utf-8"))


def stage() -> None:
    """Copies every page and figure to `build/`, the interface beside them."""
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", STAGE)
    for page in [*(ROOT / name for name in MOVED), *(ROOT / "docs").rglob("*.md")]:
        staged(page).write_text(with_links(page), encoding="utf-8")
    (STAGE / "interface.md").write_text(interface(), encoding="utf-8")


def main() -> int:
    try:
        stage()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""The settings and pages that documents name are there, and the table of settings is whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tiltflow.config.schema import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
FILES = ("py", "md", "lock", "jsonl", "yaml")
CODE = ("adapters.frozen_below", "run.metrics", "run.step")


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("section", SECTIONS)
def test_the_table_of_settings_has_every_key(section: str) -> None:
    table = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [f"| `{section}.{key}" for key in SECTIONS[section].model_fields if key != "rewards"]
    assert [row for row in rows if row not in table] == []


# docs/errors.md has misspelt ones on purpose
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "errors.md"], ids=lambda page: page.name
)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"[ `(]((?:{'|'.join(SECTIONS)})\.[a-z_]+)", text))
    unknown = []
    for setting in named:
        section, key = setting.split(".")
        if key not in (*SECTIONS[section].model_fields, *FILES) and setting not in CODE:
            unknown.append(setting)
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        # the repository and the site make one anchor of a heading where it is plain words alone
        plain = re.fullmatch(r"([a-z0-9]+(-[a-z0-9]+)*)?", anchor)
        if not target.exists() or not plain or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []

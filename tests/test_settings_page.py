"""docs/settings.md is what the schema says, and every setting has a meaning."""

from __future__ import annotations

import settings_table

from tiltflow.config.meanings import MEANINGS


def test_every_setting_has_a_meaning_and_no_other_has() -> None:
    assert set(MEANINGS) == {*settings_table.every_setting(), "rewards"}


def test_the_page_is_up_to_date() -> None:
    """`python scripts/settings_table.py` writes it."""
    assert settings_table.PAGE.read_text(encoding="utf-8") == settings_table.page()

"""A family of one's own over a known pipeline class: nothing kept of the builtin one is taken for
its own, and nothing of its code as it was before an edit."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tiltflow.config.load import dump_config, load_config
from tiltflow.core import registry
from tiltflow.core.paths import resolve_path
from tiltflow.data.embedding_cache import EncoderKey
from tiltflow.data.prompts import Prompt
from tiltflow.models import family as families
from tiltflow.models.family import GROUP, own_place
from tiltflow.models.pipelines.directory import Pipeline
from tiltflow.models.pipelines.fingerprint import family_facts
from tiltflow.setup.build import encode_sets, encoder_key
from tiltflow.tasks import dial
from tiltflow.tasks.depends import asked
from tiltflow.tasks.request import Request, _encoded

NAME = "own_encoding:FAMILY"
BASE = """
from tiltflow.models.families.sd3 import SD3Backbone

class Below(SD3Backbone):
    def _encode(self, prompts):
        return super()._encode([f"{START} {text}" for text in prompts])

START = "a photo of"
"""
RECORD = """
from dataclasses import replace
from own_encoding_base import Below
from tiltflow.models.families.sd3 import FAMILY as SD3

class Mine(Below):
    pass

FAMILY = replace(SD3, name="mine", backbone="own_encoding:Mine")
"""
BUILTIN = (None, "sd3", "tiltflow.models.families.sd3:FAMILY")


def forget() -> None:
    for name in ("own_encoding", "own_encoding_base"):
        sys.modules.pop(name, None)
    families._record.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the family's two modules."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own_encoding.py").write_text(RECORD)
    (folder / "own_encoding_base.py").write_text(BASE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(registry, "_REGISTERED", {})
    forget()
    yield folder
    forget()


def settings(cache: Path | str, family: str | None = None) -> Any:
    named = [] if family is None else [f"model.family={family}"]
    given = ["run.device=cpu", f"data.cache={cache}"]
    return load_config("demo_cold_start", [*given, *named])


def key(family: str | None = None) -> EncoderKey:
    return encoder_key(settings("off", family))


def embedded(cache: Path | str, family: str | None = None) -> torch.Tensor:
    (encoded,) = encode_sets(settings(cache, family), [[Prompt("a red circle")]], lambda line: None)
    cond, _ = encoded.select([0], torch.device("cpu"))
    return cond.positive["prompt_embeds"]


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_each_family_reads_its_own_embeddings(own: Path, tmp_path: Path) -> None:
    builtin, mine = embedded(tmp_path), embedded(tmp_path, NAME)
    assert not torch.equal(builtin, mine) and torch.equal(mine, embedded("off", NAME))
    assert torch.equal(builtin, embedded(tmp_path)) and torch.equal(mine, embedded(tmp_path, NAME))


def test_sample_reads_its_own_too(own: Path, tmp_path: Path) -> None:
    def rows(family: str | None) -> torch.Tensor:
        about: dict[str, Any] = {"device": "cpu", "cache": str(tmp_path), "family": family}
        encoded = _encoded(Request("packaged:pipeline", [Prompt("a red circle")], **about))
        return encoded.select([0], torch.device("cpu"))[0].positive["prompt_embeds"]

    builtin = rows(None)
    assert not torch.equal(rows(NAME), builtin) and torch.equal(rows(None), builtin)


def test_the_key_of_a_builtin_family_is_as_it_was(own: Path) -> None:
    """Caches of large models take hours, so however a builtin family is named it adds nothing."""
    registry.register("family", GROUP, "again", BUILTIN[-1])
    keys = [key(name) for name in (*BUILTIN, "again")]
    assert len({one.digest for one in keys}) == 1
    assert not [n for n in keys[0].facts if n == "family" or n.startswith("code of")]


@pytest.mark.parametrize(
    ("file", "old"), [("own_encoding.py", "pass"), ("own_encoding_base.py", "a photo of")]
)
def test_an_edit_is_another_key(own: Path, file: str, old: str) -> None:
    """Of the class's own module, and of one that a base class is in."""
    before = key(NAME).facts
    assert before["family"] == NAME
    edit(own / file, old, "default_sequence = 5" if old == "pass" else "a drawing of")
    assert key(NAME).facts == before  # this process still runs what it has imported
    forget()
    after = key(NAME).facts
    changed = {name for name, _ in set(before.items()) ^ set(after.items())}
    assert changed == {f"code of {file.removesuffix('.py')}"}


def test_a_name_and_a_place_are_one_family(own: Path) -> None:
    registry.register("family", GROUP, "mine", NAME)
    assert key("mine").digest == key(NAME).digest
    record = own / "own_encoding.py"
    edit(record, 'name="mine"', 'name="mine", pipeline="MinePipeline"')
    forget()
    assert own_place(None, "MinePipeline") == NAME  # by its class, which no builtin one has
    assert own_place(None, "StableDiffusion3Pipeline") is own_place("sd3", "x") is None


def test_code_in_no_file_is_another_each_time(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's cell: what it held when the cache was filled is not known."""

    def cell() -> EncoderKey:
        forget()
        module = ModuleType("own_encoding")
        monkeypatch.setitem(sys.modules, "own_encoding", module)
        exec(RECORD, vars(module))
        return key(NAME)

    first = cell()
    assert first.digest == key(NAME).digest != cell().digest


def test_an_evaluation_is_of_its_family(own: Path) -> None:
    def said(family: str | None) -> dict[str, Any]:
        return asked(Request("packaged:pipeline", [Prompt("a")], device="cpu", family=family))

    plain = said(None)
    assert "family" not in plain and plain == said("sd3")
    mine = said(NAME)
    assert mine.pop("family") == family_facts(Pipeline(resolve_path("packaged:pipeline"), NAME))
    assert mine == plain


def test_a_dial_is_of_the_runs_family(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("few_step", "tilt"):
        (tmp_path / "export" / folder).mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(dump_config(settings("off", NAME)))
    requests: list[Request] = []
    monkeypatch.setattr(dial, "_common_few_step", lambda runs: runs[0] / "export" / "few_step")
    monkeypatch.setattr(dial, "check_request", lambda request: None)
    monkeypatch.setattr(dial, "_load", lambda cfgs, asked, exams: requests.extend(asked))
    dial.load_student([tmp_path], None, "cpu")
    (request,) = requests
    assert request.family == NAME and request.pipelines.model.family.name == "mine"

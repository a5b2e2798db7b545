"""Malformed inputs: one sentence, a non-zero exit, no traceback, nothing unpickled."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import malformed_models
import pytest
from error_table import CASES, DOC, document
from malformed import Outcome, at_most, outcome

SRC = Path(__file__).parents[1] / "src"


@pytest.fixture(scope="module")
def outcomes(
    tiny_pipeline: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """A pipeline's files may take 1 GB more memory than the process has, and no more."""
    found = {}
    for title, case in CASES.items():
        own = title.split(": ")[0] in malformed_models.CASES
        with at_most(2**30) if own else nullcontext():
            found[title] = outcome(case, tmp_path_factory.mktemp("case"), tiny_pipeline)
    return found


@pytest.mark.long
@pytest.mark.parametrize("title", CASES)
def test_one_sentence(outcomes: dict[str, Outcome], title: str) -> None:
    result = outcomes[title]
    assert result.status == 2
    assert result.error.startswith("tiltflow: ") and result.error.count("\n") == 1
    assert "Traceback" not in result.error and len(result.error) < 400
    assert not result.planted


@pytest.mark.long
def test_the_documentation_is_what_is_printed(outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes) >= 60
    assert DOC.read_text() == document(outcomes)


FORBIDDEN = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle", "tarfile"}
CALLS = {
    "eval", "exec", "torch.load", "torch.hub.load", "torch.jit.load", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "shutil.unpack_archive", "np.fromfile",
}  # fmt: skip
KEYWORDS = {"allow_pickle", "trust_remote_code", "weights_only"}


def unsafe(source: str) -> list[str]:
    """Imports, calls and arguments in a module through which a file could run code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in FORBIDDEN else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            named = {k.arg: k.value for k in node.keywords}
            if called == "torch.load" and ast.unparse(named.get("weights_only", node)) == "True":
                continue  # tensors and no objects: some rewards are published in no other format
            found += [called] if called in CALLS else []
            found += [name for name in KEYWORDS & set(named)]
            if called.endswith("from_pretrained"):
                values = named.get("use_safetensors"), named.get(None)
                network = "Model" in called or "getattr" in called
                if network and not any(values):
                    found.append(f"{called} without use_safetensors")
            if called == "yaml.load" and ast.unparse(named.get("Loader", node)) != "_Loader":
                found.append(called)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "torch.load(path)", "eval(text)",
        "torch.load(path, weights_only=False)",
        "np.load(f, allow_pickle=x)", "yaml.load(text, Loader=yaml.Loader)",
        "CLIPModel.from_pretrained(place)",
    ],
)  # fmt: skip
def test_the_search_finds(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize("file", sorted(SRC.rglob("*.py")), ids=lambda f: str(f.relative_to(SRC)))
def test_nothing_in_the_source_unpickles(file: Path) -> None:
    assert unsafe(file.read_text()) == []

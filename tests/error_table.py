"""The table of malformed inputs; `python tests/error_table.py` writes docs/errors.md from it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import malformed_files
import malformed_inputs
import malformed_models
import tiny_pipelines
from malformed import Case, Outcome, outcome

DOC = Path(__file__).parents[1] / "docs" / "errors.md"

TABLE: dict[str, list[Case]] = {
    **malformed_inputs.CASES,
    **malformed_files.CASES,
    **malformed_models.CASES,
}

CASES = {f"{section}: {case.what}": case for section, inside in TABLE.items() for case in inside}
"""By title."""

HEAD = """# What malformed input gives

Each row is a command that was run on a malformed input, and the sentence that it printed; the exit
status is 2, and there is no traceback (`--debug` shows one). No input here makes the program
unpickle anything, follow a path out of its folder, run a YAML tag, or allocate what a header
claims. (Weights of rewards that are published as PyTorch files only are read by torch's restricted
reader, which gives tensors and no objects.)
`python tests/error_table.py` writes this page, and `tests/test_errors.py` checks it.
"""


def document(outcomes: Mapping[str, Outcome]) -> str:
    """The page, from the outcome of every case by title."""
    parts = [HEAD]
    for section, inside in TABLE.items():
        parts.append(f"\n## {section}\n\n| input | sentence |\n|---|---|\n")
        for case in inside:
            error = outcomes[f"{section}: {case.what}"].error
            said = error.removeprefix("tiltflow: ").strip()
            for mark in "\\|<*_":
                said = said.replace(mark, f"\\{mark}")
            parts.append(f"| {case.what} | {said} |\n")
    return "".join(parts)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        models = {
            n: tiny_pipelines.build(n, place / n)
            for n in ("sd35m", "klein", "sana", *malformed_models.NAMES)
        }
        outcomes = {}
        for i, (title, case) in enumerate(CASES.items()):
            (place / str(i)).mkdir()
            outcomes[title] = outcome(case, place / str(i), models.__getitem__)
            print(outcomes[title].status, title, "->", outcomes[title].error.strip(), flush=True)
    DOC.write_text(document(outcomes))


if __name__ == "__main__":
    main()

"""The order of the packages, which `make lint` holds (docs/architecture.md, "Rooms")."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SETTINGS = Path(__file__).parents[1] / "pyproject.toml"
CALL = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"


def linted(package: Path) -> subprocess.CompletedProcess[str]:
    contract = SETTINGS.read_text(encoding="utf-8").partition("[tool.importlinter]")
    rules = "".join(contract[1:]).partition("\n[tool.pytest")[0]
    (package.parent / "pyproject.toml").write_text(rules, encoding="utf-8")
    command = [sys.executable, "-c", CALL, "--no-cache"]
    where = {"PYTHONPATH": str(package.parent)}
    return subprocess.run(command, cwd=package.parent, env=where, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("place", "line", "passes"),
    [
        ("core", "from tiltflow.flow import x", True),
        ("core", "from tiltflow.models import x", False),
        ("models", "def late():\n    from tiltflow.training import x", False),
    ],
    ids=["downward", "upward", "upward-inside-a-function"],
)
def test_an_upward_import_fails_the_contract(
    tmp_path: Path, place: str, line: str, passes: bool
) -> None:
    """Packages of the same names, one of which has a single import."""
    contract = tomllib.loads(SETTINGS.read_text(encoding="utf-8"))["tool"]["importlinter"]
    package = tmp_path / "tiltflow"
    package.mkdir()
    (package / "__init__.py").touch()
    for layer in contract["contracts"][0]["layers"]:
        (package / layer).mkdir()
        (package / layer / "__init__.py").write_text("x = 1\n", encoding="utf-8")
    (package / place / "__init__.py").write_text(f"{line}\n", encoding="utf-8")
    found = linted(package)
    assert (found.returncode == 0) is passes, found.stdout + found.stderr
    assert ("1 broken" in found.stdout) is not passes

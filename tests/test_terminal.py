"""The command line's own surface: help at once, texts as they are, `~` wherever a path is taken."""

from __future__ import annotations

import ast
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import COMMANDS, SRC, call

from tiltflow.cli import main as cli
from tiltflow.cli.terminal import SPINS, threads_give_way
from tiltflow.config.load import list_recipes, load_config, recipe_text
from tiltflow.core.sentences import counted
from tiltflow.tasks.failures import resume_command
from tiltflow.tasks.recipes import summary

ODD = "a[/b]c :x:[red]d"
MIXTURE = ("train.steps=1", "run.device=cpu", "train.batch_size=4")

NOTHING_SLOW = """
import sys
sys.argv = ["tiltflow", *sys.argv[1:]]
from tiltflow.cli.main import main
try:
    main()
except SystemExit:
    pass
slow = {"torch", "transformers", "diffusers", "peft", "scipy", "matplotlib"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""


@pytest.mark.parametrize(
    "line", ["", "--help", "--version", "train --help", "sample --help", "recipes", "trian"]
)
def test_help_waits_for_no_library(line: str) -> None:
    command = [sys.executable, "-c", NOTHING_SLOW, *line.split()]
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONPATH": str(SRC)})


def test_the_bar_moves_every_step_and_says_what_is_left() -> None:
    from tiltflow.tasks.progress import Terminal

    clock = iter(range(0, 10**6, 120))  # two minutes go by wherever somebody looks
    said = io.StringIO()
    console = Console(file=said, width=200, get_time=lambda: next(clock))
    with Terminal(console) as shown:
        shown.begin("cold_start", 100, 1000)
        for done in (101, 102, 103):
            shown.step(done, 1000)
        assert shown._bar is not None and shown._bar.tasks[0].completed == 103
        shown.metrics(103, {"generator/matching": 0.5})
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("step")]
    done, left = line.split("  left ")
    assert done == "step 103/1000  matching 0.5"
    assert re.fullmatch(r"(\d days?, )?\d+:\d\d:\d\d", left)


def test_a_long_note_cuts_no_time_short() -> None:
    from tiltflow.tasks.progress import Terminal

    said = io.StringIO()
    with Terminal(Console(file=said, width=80)) as shown:
        shown.begin("tilt", 0, 2)
        shown.step(2, 2)
        names = (
            "remote:http://127.0.0.1:8000/my_rewards:redness",
            "clipscore",
            "clipscore_heldout",
        )
        shown.metrics(2, {f"reward/{name}": 0.6283 for name in names})
    (bar,) = [line for line in said.getvalue().splitlines() if line.startswith("tilt")]
    assert re.search(r"━ 2/2 0:00:0\d left 0:00:00 ", bar)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("train mine.yml", "mine.yaml"),
        ("train mixture_cold_start data.prompts=promts.txt", "prompts.txt"),
        ("report rnus/tilt", "runs/tilt"),
        ("report runs/tlit", "runs/tilt"),
        ("report runs/nothing_like_it", None),
        ("report rnus/cold", None),
    ],
)
def test_a_misspelt_path_is_answered_with_the_one_that_is_there(
    line: str,
    meant: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("mine.yaml", "prompts.txt"):
        Path(file).touch()
    Path("runs/tilt").mkdir(parents=True)
    assert call(monkeypatch, *line.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith(f"; did you mean {meant!r}?\n") if meant else "did you mean" not in said


@pytest.mark.parametrize(
    ("line", "on"),
    [
        ("evaluate --model x", "; the same command goes on from here"),
        ("train demo_tilt", "; run.resume=auto goes on from the last checkpoint, if there is one"),
        ("doctor", ""),
    ],
)
def test_after_ctrl_c_a_line_says_what_goes_on(
    line: str, on: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "large_imports", pressed)
    assert call(monkeypatch, *line.split()) == 130
    assert capsys.readouterr().err == f"tiltflow: interrupted{on}\n"


def test_how_threads_wait_is_the_users_where_they_say_it() -> None:
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        environment = dict(own)
        threads_give_way(environment)
        assert environment == own


@pytest.mark.long
def test_threads_give_way_from_the_start() -> None:
    command = [sys.executable, "-m", "tiltflow", "doctor"]
    environment = {"PYTHONPATH": str(SRC), "OMP_DISPLAY_ENV": "VERBOSE"}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert re.search(rf"GOMP_SPINCOUNT = '{SPINS}'", told.stderr)  # as OpenMP itself read it


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    name, number = capsys.readouterr().out.split()
    assert name == "tiltflow" and number[0].isdigit()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_debug_is_in_every_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *command.split(), "--help") == 0
    assert "--debug" in capsys.readouterr().out


def test_debug_shows_where_an_error_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown recipe"):
        call(monkeypatch, "recipes", "none", "--debug")


def test_recipes_say_what_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_recipes()
    for line, name in zip(lines, list_recipes(), strict=True):
        said = line.removeprefix(name).strip()
        stage = "1" if load_config(name, ["data.prompts=x"]).stage == "cold_start" else "2"
        assert said.startswith(f"Stage {stage} ") and 20 <= len(said) <= 90
        assert said == summary(recipe_text(name))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# One thing. Another.\nstage: x\n", "One thing"),
        ("# Of FLUX.1, on\n# two lines: more\n", "Of FLUX.1, on two lines"),
        ("stage: x\n", ""),
    ],
)
def test_summary(text: str, said: str) -> None:
    assert summary(text) == said


def test_paths_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets are no markup, `:x:` is no emoji, and a long line is not broken."""
    out = tmp_path / ODD / ("long" * 20)
    assert call(monkeypatch, "train", "mixture_cold_start", *MIXTURE, f"run.out={out}") == 0
    assert f"run directory: {out}\n" in capsys.readouterr().out
    page = out / "[b].html"
    assert call(monkeypatch, "report", out, "--out", page) == 0
    assert f"report: {page}\n" in capsys.readouterr().out
    assert call(monkeypatch, "train", "mixture_cold_start", *MIXTURE, f"run.out={out}") == 2
    assert f"{out} already holds a run" in capsys.readouterr().err
    assert call(monkeypatch, "compare", tmp_path / ODD / "none.json") == 2
    assert ODD in capsys.readouterr().err


def test_doctor_prints_paths_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["mixture_tilt", f"model.few_step={ODD}", f"data.prompts={ODD}.txt"]
    assert call(monkeypatch, "doctor", *settings) == 2
    said = capsys.readouterr()
    assert f"stage 1: not yet: model.few_step {ODD} is no directory" in said.out
    assert f"there is no file {ODD}.txt" in said.err


@pytest.mark.parametrize("file", sorted(SRC.rglob("*.py")), ids=lambda f: str(f.relative_to(SRC)))
def test_nothing_prints_through_markup(file: Path) -> None:
    """Consoles that speak are made in one place; the progress bar's columns are told."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called, named = ast.unparse(node.func), {k.arg for k in node.keywords}
        assert called != "Text.from_markup"
        if called == "Console" and file.name != "terminal.py":
            assert ast.unparse(node) == "Console(quiet=True)"
        if called == "TextColumn" and "{" in ast.unparse(node.args[0]):
            assert "markup" in named


def test_the_command_that_goes_on_can_be_pasted(tmp_path: Path) -> None:
    out = tmp_path / "a b[c];d"
    *_, config, resume = shlex.split(resume_command(out, 1))
    assert (config, resume) == (str(out / "config.yaml"), "run.resume=true")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, in another place than the current one."""
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


PLACES = (
    "model.path", "model.generator_path", "model.few_step", "data.prompts", "data.eval_prompts",
    "data.cache", "watch.clip", "run.out", "rewards.linear.path", "watch.rewards.linear.path",
)  # fmt: skip


@pytest.mark.parametrize("key", PLACES)
def test_a_setting_that_is_a_path_takes_the_home_directory(home: Path, key: str) -> None:
    reward = [f"{key.removesuffix('.path')}={{weight: 1}}"] if "rewards" in key else []
    cfg = load_config("flux2_klein_4b_tilt", ["data.prompts=p", *reward, f"{key}=~/a"])
    value: object = cfg.model_dump()
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    assert value == str(home / "a")
    with pytest.raises(ValueError, match=f"{key} is '~nobody-here/a', but it should not begin"):
        load_config("flux2_klein_4b_tilt", ["data.prompts=p", *reward, f"{key}=~nobody-here/a"])


def test_commands_take_the_home_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Path.cwd()
    assert call(monkeypatch, "train", "mixture_cold_start", *MIXTURE, "run.out=~/run") == 0
    assert (home / "run" / "checkpoints").is_dir()
    assert call(monkeypatch, "report", "~/run", "--out=~/page.html") == 0
    assert (home / "page.html").is_file()
    capsys.readouterr()
    for line in (
        "compare ~/none",
        "export ~/none --out ~/x",
        "sample --model ~/none --prompt x --out ~/images --device cpu",
        "evaluate --model ~/none --prompt x --reward clipscore --json ~/e.json --device cpu",
        "sample --model packaged:pipeline --prompts ~/none --out ~/images --device cpu",
        "sample --model packaged:pipeline --few-step ~/none --prompt x --out ~/i --device cpu",
    ):
        assert call(monkeypatch, *line.split()) == 2
        assert str(home / "none") in capsys.readouterr().err, line
    assert call(monkeypatch, "report", "~nobody-here/run") == 2
    assert "there is no home directory of that user" in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sample --steps 1000000000", "less than or equal to 1000"),
        ("sample --teacher-steps 1001", "less than or equal to 1000"),
        ("sample --batch 100000", "less than or equal to 65536"),
        ("sample --seed 18446744073709551616", "less than or equal to 9223372036854775807"),
        ("sample --resolution 1000000", "less than or equal to 4096"),
        ("evaluate --max-sequence-length 1000000000", "less than or equal to 4096"),
        ("evaluate --teacher-steps 0", "greater than or equal to 1"),
        ("reward-server shapes --batch 1000000", "less than or equal to 65536"),
    ],
)
def test_every_count_of_the_command_line_ends_somewhere(
    line: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "server" in line else ["--model", "x"]
    assert call(monkeypatch, *line.split(), *model) == 2
    said = capsys.readouterr().err
    option = next(part for part in line.split() if part.startswith("--"))
    assert option in said and words in said and said.count("\n") == 1


def test_one_is_counted_as_one() -> None:
    said = [counted(n, "image") for n in (0, 1, 2)] + [counted(2, "batch", "batches")]
    assert said == ["0 images", "1 image", "2 images", "2 batches"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf_8_ends_nothing(encoding: str) -> None:
    run = [sys.executable, "-m", "tiltflow", "recipes", "mixture_tilt"]
    env = {"PYTHONPATH": str(SRC), "PYTHONIOENCODING": encoding}
    told = subprocess.run(run, capture_output=True, env=env)
    assert told.returncode == 0 and told.stderr == b""
    whole = recipe_text("mixture_tilt")
    assert told.stdout.decode(encoding).split() == (
        whole.encode(encoding, "replace").decode(encoding).split()
    )
    assert not whole.isascii()

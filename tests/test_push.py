"""`tiltflow push` against a stand-in of the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_stand_in import Hub, hub
from huggingface_hub import constants
from PIL import Image
from students import student
from test_documents import ROOT
from typer.testing import CliRunner

from tiltflow.cli.main import app
from tiltflow.config.load import dump_config
from tiltflow.core.checkpoint import save_checkpoint
from tiltflow.formats.wanted import Wanted
from tiltflow.tasks.push import push_run

TOKEN = "hf_right"
SENT = {
    "README.md", "contract.json", "samples.png", "scheduler/scheduler_config.json",
    *(f"{name}/{file}" for name in ("few_step", "tilt")
      for file in ("contract.json", "pytorch_lora_weights.safetensors")),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_pipeline: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a stage-2 run of a tiny pipeline, with two pictures of samples."""
    place = tmp_path_factory.mktemp("push")
    (place / "prompts.txt").write_text("a cat\n")
    made = student(tiny_pipeline, "sd35m", place)
    out = place / "run"
    (out / "samples").mkdir(parents=True)
    (out / "config.yaml").write_text(dump_config(made.config))
    save_checkpoint(out, 3, made.checkpoint.tensors, {"step": 3, **made.checkpoint.state}, keep=1)
    for step, colour in ((0, "red"), (3, "blue")):
        Image.new("RGB", (8, 8), colour).save(out / "samples" / f"step-{step:06d}.png")
    return out


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, with a token for it in the environment."""
    with hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_what_is_pushed_is_the_export_and_its_samples(there: Hub, run: Path) -> None:
    pushed = push_run(run, "me/student", private=True)
    assert pushed.url is not None and pushed.url.startswith(f"{there.url}/me/student/commit/")
    assert there.repositories == {"me/student": True} and there.commits == 1
    assert set(pushed.files) == SENT and set(there.files) - {".gitattributes"} == SENT
    for file in SENT:
        assert there.files[file] == (run / "push" / file).read_bytes()
    assert there.files["samples.png"] == (run / "samples" / "step-000003.png").read_bytes()
    card = there.files["README.md"].decode()
    assert (
        card.startswith("---\n")
        and "\nbase_model: " in card
        and "![Samples at iteration 3]" in card
    )
    assert not any(TOKEN.encode() in content for content in there.files.values())
    # again, into what is there
    assert push_run(run, "me/student", private=True).url is not None and there.commits == 2


def test_a_push_takes_the_place_of_an_earlier_one(there: Hub, run: Path, tmp_path: Path) -> None:
    """Files of other formats would be of another student, and nobody would say so; what is not an
    export's stays. Samples of iterations that were not saved are not the student's."""
    later = Path(shutil.copytree(run, tmp_path / "run"))
    Image.new("RGB", (8, 8), "green").save(later / "samples" / "step-000004.png")
    there.files |= {"notes.md": b"mine", "comfyui/mine.json": b"mine", "tilt/own.txt": b"mine"}
    there.files["LICENSE.md"] = b"mine, or of an earlier base"
    push_run(later, "me/student", Wanted(("diffusers", "comfyui"), (0.5,)))
    assert {"comfyui/tilt.safetensors", "baked_0.5/contract.json"} <= set(there.files)
    assert there.files["samples.png"] == (run / "samples" / "step-000003.png").read_bytes()
    shutil.rmtree(later / "samples")
    push_run(later, "me/student")
    mine = {"notes.md", "comfyui/mine.json", "tilt/own.txt", ".gitattributes", "LICENSE.md"}
    assert set(there.files) - mine == SENT - {"samples.png"} and len(mine - set(there.files)) <= 1
    assert "samples.png" not in there.files["README.md"].decode() and there.commits == 2


def test_a_dry_run_asks_nobody(there: Hub, run: Path) -> None:
    there.refuse = "/"
    told = CliRunner().invoke(app, ["push", str(run), "me/student", "--dry-run"])
    assert told.exit_code == 0, told.exception
    assert all(str(run / "push" / file) in told.output.replace("\n", "") for file in SENT)
    assert not there.repositories and "samples.png" in (run / "push" / "README.md").read_text()


@pytest.mark.parametrize(
    ("refuse", "status", "said"),
    [
        ("/commit/", 403, "the token may not write there"),
        ("/preupload/", 400, "the Hub answered 400"),
        ("/objects/batch", 403, "may not write"),
        ("/store/", 400, "the Hub answered 400"),
    ],
)
def test_a_failed_upload_is_one_sentence_and_can_be_repeated(
    there: Hub, run: Path, refuse: str, status: int, said: str
) -> None:
    there.refuse, there.status = refuse, status
    with pytest.raises(ValueError, match=said) as caught:
        push_run(run, "me/student")
    text = str(caught.value)
    assert text.startswith("me/student was not updated: ") and "tries again" in text
    assert "\n" not in text and TOKEN not in text and there.commits == 0
    there.refuse = ""
    assert push_run(run, "me/student").url is not None and there.commits == 1


def test_what_the_hub_or_we_refuse(
    there: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("a/b/c", "-x", "me/two words", "me/..", "", "https://hub/me"):
        with pytest.raises(ValueError, match="is no name of a repository"):
            push_run(run, name)
    there.repositories["me/open"] = False
    with pytest.raises(ValueError, match="me/open is public already"):
        push_run(run, "me/open", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="knows no valid token: log in") as caught:
        push_run(run, "me/student")
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="the Hub could not be reached"):
        push_run(run, "me/student")
    assert there.commits == 0
    with pytest.raises(ValueError, match="is no run directory"):
        push_run(tmp_path, "me/student")


def test_the_token_is_huggingface_hubs_business() -> None:
    source = (ROOT / "src" / "tiltflow" / "tasks" / "push.py").read_text()
    assert "token=" not in source and "get_token" not in source

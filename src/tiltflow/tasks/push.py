"""`tiltflow push`: a run's student as a repository of the Hugging Face Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from tiltflow.formats.contract import CONTRACT_FILE
from tiltflow.formats.folder import of_an_export
from tiltflow.formats.wanted import Wanted
from tiltflow.tasks.callbacks import SILENT, Callbacks
from tiltflow.tasks.export import export_run
from tiltflow.tasks.run import Run
from tiltflow.tasks.sheets import sheets

FOLDER = "push"
"""Where in the run directory what is sent is written, and stays to be looked at."""

PICTURE = "samples.png"


@dataclass(frozen=True)
class Pushed:
    """`url` of the commit, None where nothing was sent; `files` in `folder` by their paths there;
    `base` is the base model's id on the Hub, None where only a directory's name is known."""

    url: str | None
    folder: Path
    files: list[str]
    base: str | None


def push_run(
    run: Path,
    repository: str,
    wanted: Wanted | None = None,
    private: bool = False,
    dry_run: bool = False,
    callbacks: Callbacks = SILENT,
) -> Pushed:
    """Exports a run's latest checkpoint and sends it as one commit; the repository is made where
    there is none. With `dry_run` the folder is written and nobody is asked.

    The token is the one of the login or of HF_TOKEN, which huggingface_hub reads by itself.

    Raises:
        ValueError: as `export_run`; if the name is none, the repository is public and `private` is
            asked for, or the Hub refuses or cannot be reached. The same call may be made again.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(
            f"{repository!r} is no name of a repository: give NAME or OWNER/NAME, of letters, "
            "digits, '-', '_' and '.'"
        ) from error
    folder = prepare(run, wanted, callbacks)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    base = json.loads((folder / CONTRACT_FILE).read_text(encoding="utf-8"))["base"]["hub_id"]
    url = None if dry_run else _send(folder, repository, private)
    return Pushed(url, folder, files, base)


def prepare(run: Path, wanted: Wanted | None, callbacks: Callbacks = SILENT) -> Path:
    """The folder that is sent: the export and, of a run that drew some, its last samples.

    Raises:
        ValueError: as `export_run`, or if something else lies where the folder goes.
    """
    folder = Run(run).path / FOLDER
    if folder.exists():
        if not (folder / CONTRACT_FILE).is_file():
            raise ValueError(f"{folder} is not what an earlier push wrote: move it away")
        (folder / PICTURE).unlink(missing_ok=True)  # the rest the export replaces
    export_run(run, folder, wanted, callbacks)
    done = Run(run).step or 0  # a kill may have left samples of iterations that were not saved
    pictures = sheets(run)
    step = max((step for step in pictures if step <= done), default=None)
    if step is not None:
        shutil.copyfile(pictures[step], folder / PICTURE)
        shown = f"## Samples\n\n![Samples at iteration {step}]({PICTURE})\n\n## Recipe\n"
        card = (folder / "README.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(card.replace("## Recipe\n", shown, 1), encoding="utf-8")
    return folder


def _send(folder: Path, repository: str, private: bool) -> str:
    """One commit of the folder in the place of an earlier one; its address.

    Raises:
        ValueError: if the Hub refuses it or cannot be reached, or as `push_run` on `private`.
    """
    hub = HfApi()
    try:
        name = hub.create_repo(repository, private=private or None, exist_ok=True).repo_id
        if private and not hub.repo_info(name).private:
            raise ValueError(
                f"{name} is public already, and --private makes new repositories only: make it "
                "private on the Hub, or give another name"
            )
        commit = hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="A student trained with tiltflow",
            delete_patterns=_earlier(hub.list_repo_files(name)),
        )
    except (HTTPError, OSError, RuntimeError) as error:  # the last of a file's own upload
        raise ValueError(
            f"{repository} was not updated: {_reason(error)}; {folder} has what was to be "
            "sent, and the same command tries again"
        ) from error
    return str(commit.commit_url)


def _earlier(files: Sequence[str]) -> list[str] | None:
    """What an earlier push left in a repository: what is not sent again is of another student."""
    if CONTRACT_FILE not in files:
        return None
    return [file for file in files if file == PICTURE or of_an_export(file)] or None


def _reason(error: Exception) -> str:
    """Why the Hub took nothing, without an address or header that the request had."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub could not be reached ({type(error).__name__})"
    status = error.response.status_code
    if status == 401:
        return "the Hub knows no valid token: log in (hf auth login), or set HF_TOKEN"
    if status == 403:
        return "the token may not write there"
    return f"the Hub answered {status} ({error.server_message or error.response.reason_phrase})"

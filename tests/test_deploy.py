"""The files in deploy/, by their form: nothing here is built or launched."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"

# SkyPilot takes 460 MB. Its own checker has read both files (0.14.1; docs/distributed.md). These
# are the fields that its reference names and that we use:
# https://docs.skypilot.co/en/latest/reference/yaml-spec.html
TASK = {"name": str, "num_nodes": int, "resources": dict, "workdir": str, "volumes": dict,
        "envs": dict, "setup": str, "run": str}  # fmt: skip
RESOURCES = {"infra": str, "accelerators": str, "job_recovery": dict}
VOLUME = {"name": str, "type": str, "infra": str, "size": str, "config": dict}
INSTRUCTIONS = {"FROM", "RUN", "USER", "WORKDIR", "ENV", "COPY", "VOLUME", "ENTRYPOINT", "CMD"}


def document(name: str, fields: dict[str, type]) -> dict[str, object]:
    """A YAML file whose keys are `fields`, each of its kind."""
    found = yaml.safe_load((DEPLOY / name).read_text())
    assert {key: type(value) for key, value in found.items()} == fields
    return found


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with what they are given; comments gone, lines joined."""
    lines = [x for x in (DEPLOY / "Dockerfile").read_text().splitlines() if not x.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in pairs]


def test_the_skypilot_task() -> None:
    task = document("skypilot.yaml", TASK)
    volume = document("skypilot_volume.yaml", VOLUME)
    resources = task["resources"]
    assert isinstance(resources, dict) and isinstance(task["volumes"], dict)
    assert {key: type(value) for key, value in resources.items()} == RESOURCES
    assert re.fullmatch(r"[\w-]+:\d+", resources["accelerators"])
    assert list(task["volumes"].values()) == [volume["name"]]
    assert volume["config"] == {"access_mode": "ReadWriteMany"}
    assert "run.resume=auto" in str(task["run"])
    assert isinstance(task["envs"], dict)
    places = [str(value).removeprefix("run.out=") for key, value in task["envs"].items()
              if key != "RECIPE"]  # fmt: skip
    assert all(place.startswith(f"{next(iter(task['volumes']))}/") for place in places)


@pytest.mark.parametrize("part", ["setup", "run"])
def test_skypilots_shell(part: str) -> None:
    text = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())[part]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_the_dockerfile() -> None:
    found = instructions()
    names = [name for name, _ in found]
    assert set(names) == INSTRUCTIONS and names[0] == "FROM"
    image, _, tag = found[0][1].partition(":")
    assert image == "nvidia/cuda" and re.fullmatch(r"\d+\.\d+\.\d+-base-ubuntu[\d.]+", tag)
    users = [rest for name, rest in found if name == "USER"]
    assert users == ["10001"]  # by number, which Kubernetes' runAsNonRoot can check
    assert all("sudo" not in rest for _, rest in found)
    # what pip installs, no root installs
    pips = [i for i, (name, rest) in enumerate(found) if name == "RUN" and "pip install" in rest]
    assert pips and all(i > names.index("USER") and "--no-cache-dir" in found[i][1] for i in pips)
    packages = next(rest for name, rest in found if name == "RUN" and "apt-get install" in rest)
    assert "--no-install-recommends" in packages and "rm -rf /var/lib/apt/lists/*" in packages
    assert ("VOLUME", '["/cache"]') in found
    kept = next(rest for name, rest in found if name == "ENV")
    assert {"HF_HOME=/cache/huggingface", "TILTFLOW_CACHE=/cache/tiltflow"} <= set(kept.split())
    for name, rest in found:
        if name == "COPY":
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint() -> None:
    subprocess.run(["hadolint", DEPLOY / "Dockerfile"], check=True)

"""Malformed command lines and settings: one sentence, a non-zero exit, and nothing begun: no file
and no directory is made, not even one that would be empty."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import call

DEMO = "train demo_cold_start run.device=cpu run.out=out "
TILT = "train demo_tilt run.device=cpu run.out=out model.few_step=cold "
MIXTURE = "train mixture_cold_start run.out=out "
SAMPLE = "sample --device cpu --out out --prompt x "

LINES = {
    # settings
    DEMO + "train.steps=-1": "train.steps",
    DEMO + "train.steps=1e3": "train.steps",
    DEMO + "train.steps=0x10": "train.steps",
    DEMO + "train.steps=010": "train.steps",
    DEMO + "train.steps=1_000": "train.steps",
    DEMO + "train.batch_size=65537": "65536",
    DEMO + "train.warmup=-3": "train.warmup",
    DEMO + "train.betas=[0.9,0.99,0.999]": "train.betas",
    DEMO + "train.betas=0.9": "train.betas",
    DEMO + "train.ema=1": "train.ema",
    DEMO + "train.schedule=linear": "train.schedule",
    DEMO + "train.fake_scores=both": "train.fake_scores",
    DEMO + "train=": "train.steps",
    DEMO + "data=": "data.prompts",
    DEMO + "data.prompts=": "data.prompts",
    DEMO + "data.prompts=[a]": "data.prompts",
    DEMO + "model.resolution=8192": "4096",
    DEMO + "model.max_sequence_length=-1": "model.max_sequence_length",
    DEMO + "model.dtype=fp16": "model.dtype",
    DEMO + "model.compile=yes": "model.compile",
    DEMO + "adapters.rank=0": "adapters.rank",
    DEMO + "adapters.rank=1000000": "4096",
    DEMO + "adapters.alpha=0": "adapters.alpha",
    DEMO + "adapters.targets=[]": "adapters.targets",
    DEMO + "sampler.steps=1001": "1000",
    DEMO + "sampler.eta=-0.1": "sampler.eta",
    DEMO + "cold_start.reuse=5": "cold_start.reuse",
    DEMO + "watch.frequency=0.5": "watch.frequency",
    DEMO + "watch.levels=[]": "watch.levels",
    DEMO + "watch.levels=[1.5]": "watch.levels",
    DEMO + "log.samples=100000": "10000",
    DEMO + "run.seed=-1": "run.seed",
    DEMO + "run.seed=1.5": "run.seed",
    DEMO + "run.resume_from=step-1": "run.resume_from",
    DEMO + "run.resume_from=step-000001": "run.resume",
    DEMO + "run.device=cuda:-1": "run.device",
    DEMO + "run.out=prompts.txt/a": "run.out",
    DEMO + "run.out=~nobody-here/a": "run.out",
    DEMO + "checkpoint.keep=0": "checkpoint.keep",
    DEMO + "checkpoint=all": "checkpoint",
    DEMO + "data.split=train": "has no splits",
    DEMO + "data.prompts=prompts.txt data.eval_split=test": "has no splits",
    DEMO + "log.wandb=true": "wandb",
    DEMO + "data.cache=prompts.txt": "data.cache",
    DEMO + "watch.rewards.shapes.path=x": "shapes",
    DEMO + "a.b.c.d=1": "unknown key",
    DEMO + "..=1": "unknown key",
    DEMO + "stage": "key=value",
    TILT: "train stage cold_start first",
    TILT + "tilt.reward_steps=9": "tilt.reward_steps",
    TILT + "rewards=3": "rewards",
    TILT + "rewards.shapes=high": "rewards.shapes",
    MIXTURE + "model.base_storage=fp8": "model.base_storage",
    "train": "recipe",
    "train demo_cold_start.yml": "there is no recipe file",
    "train ~nobody-here/r.yaml": "no home directory",
    "train prompts.txt": "unknown recipe",
    "encode mixture_cold_start": "no text encoder",
    # command lines
    "--verbose": "--verbose",
    "trian --version": "trian",
    SAMPLE + "--model packaged:none": "there is no packaged 'none'",
    SAMPLE + "--model packaged:pipeline --steps 4.5": "--steps",
    SAMPLE + "--model packaged:pipeline --eta 2": "--eta",
    SAMPLE + "--model packaged:pipeline --seed -1": "--seed",
    SAMPLE + "--model packaged:pipeline --resolution 4": "--resolution",
    SAMPLE + "--model packaged:pipeline --batch 0": "--batch",
    SAMPLE + "--model ~nobody-here/m": "no home directory",
    "sample --model packaged:pipeline --prompts none.txt --out out": "none.txt",
    "evaluate --model packaged:pipeline --prompt x --reward shapes --reward shapes": "twice",
    "evaluate --model packaged:pipeline --prompts prompts.txt --reward shapes --count 1": "--count",
    "compare": "EVALUATION",
    "compare prompts.txt": "prompts.txt",
    "compare prompts.txt prompts.txt prompts.txt": "one or two",
    "report": "RUN",
    "report prompts.txt": "no run directory",
    "export prompts.txt --out out": "no run directory",
    "recipes one two": "two",
    "doctor demo_cold_start --memory nan": "--memory",
    "doctor demo_cold_start --memory -1": "--memory",
    "doctor demo_cold_start data.prompts=none.txt": "none.txt",
}


def found(folder: Path) -> set[str]:
    return {str(place) for place in folder.rglob("*")}


@pytest.mark.parametrize("line", LINES)
def test_nothing_is_begun(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TILTFLOW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    before = found(tmp_path)
    assert call(monkeypatch, *line.split()) != 0
    said = capsys.readouterr().err
    assert said.startswith("tiltflow: ") and said.count("\n") == 1 and len(said) < 400
    assert LINES[line] in said and "Traceback" not in said
    assert found(tmp_path) == before

"""What stage 2 starts from: how its stage 1 was made, and what of it a resumed run compares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from short_runs import SHORT
from test_checks import run
from test_run_directory import start

from tiltflow.config.load import RunConfig, list_recipes, load_config
from tiltflow.core.checkpoint import latest_step, load_checkpoint
from tiltflow.core.disk import sha256
from tiltflow.data.prompts import Prompt
from tiltflow.formats.contract import BaseModelFacts, Contract
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint
from tiltflow.models.roles import State
from tiltflow.setup import start_notices as notices
from tiltflow.setup.build import build_stage
from tiltflow.setup.facts import Facts
from tiltflow.setup.start_notices import Made, start_notices
from tiltflow.setup.starts import below
from tiltflow.tasks.callbacks import Callbacks
from tiltflow.tasks.evaluate import sampled
from tiltflow.tasks.request import Request
from tiltflow.training.changes import OF_THE_RUN, changes

TILT = (
    "tilt.group_size=2", "train.batch_size=8", "run.device=cpu", "log.samples_every=0",
    "watch.rewards={}", "log.every=1", "checkpoint.every=1",
)  # fmt: skip


def stage_one(cfg: RunConfig, out: Path, step: int | None = None, **changed: Any) -> Path:
    """A folder that says what a run of `cfg` says at `step` (its last), without its weights."""
    sampler, model = cfg.sampler, cfg.model
    facts = Facts("cold_start", None, None, sampler.steps, sampler.eta, model.student_guidance,
                  None, None)  # fmt: skip
    state = {
        "step": cfg.train.steps if step is None else step,
        **facts.as_json(),
        "manifest": {"base": "b" * 64, "config": cfg.model_dump(mode="json")},
        **changed,
    }
    folder = out / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    return out


def lines(cfg: RunConfig, base: str | None = None) -> list[str]:
    return start_notices(cfg, [Prompt("a cat")], cfg.model.pipelines, base)


def of_sd3m(stage: str, *more: str) -> RunConfig:
    return load_config(f"sd3m_{stage}", ["data.prompts=p.txt", *more])


@pytest.mark.long
def test_the_shipped_pairs_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published runs' stages, and the demo's, are sampled alike (METHOD §6, §9)."""
    monkeypatch.chdir(tmp_path)
    names = set(list_recipes())
    pairs = 0
    for name in sorted(n for n in names if "_tilt" in n):
        more = [] if name.startswith(("demo", "mixture")) else ["data.prompts=p.txt"]
        cfg = load_config(name, more)
        assert cfg.model.few_step is not None
        below = Path(cfg.model.few_step)
        first = below.name if below.name in names else name.replace("tilt", "cold_start")
        if not below.exists():
            stage_one(load_config(first, more), below)
        assert lines(cfg) == [], name
        pairs += 1
    assert pairs > 20


def test_a_stage_one_that_has_not_ended_is_said(tmp_path: Path) -> None:
    cold = of_sd3m("cold_start", "train.steps=100000")
    cfg = of_sd3m("tilt", f"model.few_step={stage_one(cold, tmp_path / 'a', 32)}")
    assert lines(cfg) == [
        f"model.few_step {tmp_path / 'a'} is stage 1 at step 32 of 100,000, not at its end"
    ]
    ended = of_sd3m("tilt", f"model.few_step={stage_one(cold, tmp_path / 'b')}")
    assert lines(ended, "b" * 64) == []
    assert (
        "weights have the hash bbbbbbbbbbbb, but those here have cccc" in lines(ended, "c" * 64)[0]
    )
    assert lines(cold) == []
    assert lines(of_sd3m("tilt", f"model.few_step={tmp_path / 'gone'}", "run.resume=true")) == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd3.5-Large-Turbo", "models--x--large-turbo/snapshots/0a"])
def test_a_teacher_called_turbo_is_asked_about(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Its files do not tell it from the model that it was distilled from, which is guided by 7."""
    model = shutil.copytree(tiny_pipeline("sd35m"), tmp_path / name)
    asked = [f"model.path={model}", "model.resolution=64"]
    (line,) = lines(of_sd3m("cold_start", *asked))
    assert "is called Turbo" in line and "and model.guidance=1 leaves it out" in line
    assert lines(of_sd3m("cold_start", *asked, "model.guidance=1")) == []
    said: list[str] = []

    class Told(Callbacks):
        def notice(self, text: str) -> None:
            said.append(text)

    request = Request(str(model), [Prompt("a cat")], teacher_steps=1, resolution=64, device="cpu")
    for of in (request, replace(request, guidance=1.0)):
        sampled(of, Told())
    assert len(said) == 1 and "--guidance 1 leaves it out" in said[0]


def test_phases_that_no_iteration_reaches_are_said() -> None:
    """Four boundaries, of which 200 iterations in phases of 100 train the first two."""
    phased = ("cold_start.boundary_order=phased", "cold_start.reuse=1", "cold_start.phase=100")
    found = lines(of_sd3m("cold_start", *phased, "train.steps=200"))
    assert len(found) == 1 and "train.steps 200 ends in phase 2 of 4" in found[0]
    assert "phase 3 of 4" in lines(of_sd3m("cold_start", *phased, "train.steps=300"))[0]
    assert lines(of_sd3m("cold_start", *phased, "train.steps=301")) == []
    assert lines(of_sd3m("cold_start", "cold_start.phase=100", "train.steps=200")) == []


def test_a_weight_that_ones_own_objective_does_not_read_is_said() -> None:
    own = ("train.boundary_power=1", "cold_start.objective=own:Difference")
    assert "train.boundary_power 1 weighs AC-DMD's" in lines(of_sd3m("cold_start", *own))[0]
    assert lines(of_sd3m("cold_start", own[1])) == []
    assert lines(of_sd3m("cold_start", own[0], "cold_start.objective=decoupled")) == []


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ("sampler.steps=16", "sampler.steps=4", "sampler.steps is 4, but P was trained with 16"),
        (
            "sampler.steps=[2,4]",
            "sampler.steps=[3,4,6]",
            "sampler.steps is 3 and 6, but P was trained with 2 and 4",
        ),
        ("sampler.steps=[2,4]", "sampler.steps=4", None),
        ("sampler.eta=0.9", "sampler.eta=0.1", "sampler.eta is 0.1, but P was trained with 0.9"),
        (
            "model.student_guidance=1.0",
            "model.student_guidance=3.5",
            "model.student_guidance is 3.5, but P was trained with 1.0",
        ),
        (
            "model.resolution=512",
            "model.resolution=[512,768]",
            "model.resolution is 512x768, but P was trained with 512",
        ),
        ("model.resolution=512", "model.resolution=[512,512]", None),
        (
            "data.buckets=[512,768]",
            "data.buckets=[512,1024]",
            "model.resolution is 1024, but P was trained with 512 and 768",
        ),
        (
            "model.max_sequence_length=256",
            "model.max_sequence_length=128",
            "model.max_sequence_length is 128, but P was trained with 256",
        ),
    ],
)
def test_another_sampling_is_said(
    tmp_path: Path, first: str, then: str, said: str | None
) -> None:  # fmt: skip
    cold = of_sd3m("cold_start", first)
    sizes = {"sizes": [bucket.size for bucket in cold.data.buckets]} if cold.data.buckets else {}  # type: ignore[union-attr]
    place = stage_one(cold, tmp_path / "cold", **sizes)
    cfg = of_sd3m("tilt", then, f"model.few_step={place}")
    wanted = [] if said is None else [said.replace("P", f"model.few_step {place}")]
    assert lines(cfg) == wanted


def test_what_an_earlier_version_did_not_keep_is_not_compared(tmp_path: Path) -> None:
    place = stage_one(of_sd3m("cold_start", "sampler.steps=9"), tmp_path / "cold", 3)
    file = place / "checkpoints" / "step-000001" / "state.json"
    file.write_text(json.dumps({"stage": "cold_start", "step": 3}))
    assert lines(of_sd3m("tilt", f"model.few_step={place}")) == []


def test_an_exports_contract_is_compared_with_what_unset_values_mean(
    tmp_path: Path, tiny_pipeline: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contract has a guidance of 1.0, a size and a length where a config leaves them unset."""
    model = tiny_pipeline("sd3m")
    unset = ["model.resolution=null", "model.max_sequence_length=null"]
    cfg = of_sd3m("tilt", f"model.path={model}", f"model.few_step={tmp_path}", *unset)
    own = notices._own(cfg, cfg.model.pipelines)
    contract = Contract(
        stage="cold_start", family="sd3", pipeline="x", base=BaseModelFacts(name="x", hash="h"),
        steps=4, sigmas=(1.0, 0.0), eta=0.9, guidance=1.0,
        resolution=own[notices.SIZES], max_sequence_length=own[notices.LENGTH], dtype="fp32",
    )  # fmt: skip
    monkeypatch.setattr(notices, "read_contract", lambda folder: contract)
    assert lines(cfg) == []
    other = contract.model_copy(update={"guidance": 2.0, "resolution": 8, "eta": 0.5})
    monkeypatch.setattr(notices, "read_contract", lambda folder: other)
    assert [line.partition(",")[0] for line in lines(cfg)] == [
        "sampler.eta is 0.9",
        "model.student_guidance is 1.0",
        f"model.resolution is {own[notices.SIZES]}",
    ]
    monkeypatch.setattr(notices, "read_contract", lambda folder: None)  # a LoRA of others
    assert notices.made_by(tmp_path) == Made() and lines(cfg) == []


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage 1 of 3 steps, with a checkpoint of each."""
    out = tmp_path_factory.mktemp("cold")
    start("mixture_cold_start", *SHORT, "train.steps=3", "checkpoint.every=1", f"run.out={out}")
    return out


def tilt(few_step: Path, out: Path, *more: str) -> str:
    return start("mixture_tilt", *TILT, f"model.few_step={few_step}", f"run.out={out}", *more)


def with_state(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the state of a run's latest checkpoint, and its checksum."""
    folder = run / "checkpoints" / f"step-{latest_step(run):06d}"
    file, manifest = folder / "state.json", folder / "manifest.json"
    state, held = json.loads(file.read_text()), json.loads(manifest.read_text())
    change(state)
    file.write_text(json.dumps(state))
    held["files"]["state.json"] = sha256(file)
    manifest.write_text(json.dumps(held))


def test_train_and_doctor_say_it(
    cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first = shutil.copytree(cold, tmp_path / "cold")
    with_state(first, lambda state: state["manifest"]["config"]["train"].update(steps=9))
    said = tilt(first, tmp_path / "out", "train.steps=1", "sampler.eta=0.5")
    half = f"warning: model.few_step {first} is stage 1 at step 3 of 9, not at its end"
    eta = f"warning: sampler.eta is 0.5, but model.few_step {first} was trained with 0.9"
    assert half in said and eta in said
    assert "warning" not in tilt(cold, tmp_path / "whole", "train.steps=1")
    monkeypatch.setenv("COLUMNS", "1000")
    given = [f"model.few_step={first}", "sampler.eta=0.5", *TILT]
    assert run(monkeypatch, "doctor", "mixture_tilt", *given) == 0
    seen = capsys.readouterr().out
    assert half in seen and eta in seen
    assert (
        run(monkeypatch, "doctor", "mixture_tilt", f"model.few_step={tmp_path / 'no'}", *TILT) == 0
    )
    assert "warning" not in capsys.readouterr().out


def test_fake_scores_of_other_boundaries_are_refused(cold: Path, tmp_path: Path) -> None:
    """Steps 1 and 3 have as many boundaries as 4, at other noise levels."""
    each = "train.fake_scores=per_boundary"
    start("mixture_cold_start", *SHORT, "train.steps=1", each, "sampler.steps=[1,3]",
          f"run.out={tmp_path / 'cold'}")  # fmt: skip
    given = [*TILT, f"model.few_step={tmp_path / 'cold'}", f"run.out={tmp_path / 'x'}"]

    def built(*more: str) -> object:
        return build_stage(load_config("mixture_tilt", [*given, *more]))

    for steps in ("4", "5"):
        words = f"sampler.steps 1 and 3, but here sampler.steps is {steps}: give the same"
        with pytest.raises(ValueError, match=words):
            built(each, f"sampler.steps={steps}")
    built("sampler.steps=4")  # one for all, of the last boundary's
    built(each, "sampler.steps=[1,3]", "tilt.policy_weight=0")
    given[-2] = f"model.few_step={cold}"
    built(each, "sampler.steps=5")  # each of one that was for all


def test_the_reference_of_full_copies_is_compared_where_it_is_read(cold: Path) -> None:
    given = [*TILT, f"model.few_step={cold}", "run.out=x"]

    def stood_on(*more: str) -> State | None:
        cfg = load_config("mixture_tilt", [*given, *more])
        return below(cfg, build_stage(cfg).stage.roles)

    ema = load_checkpoint(cold).tensors["ema"]
    kept = stood_on("tilt.kl=1.0")
    assert kept is not None and adapter_fingerprint(kept) == adapter_fingerprint(ema)
    assert stood_on() is None and stood_on("tilt.terms={nft: {}}") is None
    manifest = {key: "a" for key in OF_THE_RUN} | {"config": {}, "prompts": "", "eval_prompts": ""}
    facts = {"stage": "tilt", "steps": 4, "manifest": manifest}
    for other, refused in (("b", True), ("a", False), (None, False)):  # None: of earlier versions
        there = {**facts, "manifest": {**manifest, "few_step": other, "rewards": None}}
        with pytest.raises(ValueError, match="its model.few_step") if refused else nullcontext():
            assert changes(there, facts, {}) == {}


@pytest.mark.long
def test_the_kls_reference_is_compared_where_full_copies_go_on(cold: Path, tmp_path: Path) -> None:
    first, out = shutil.copytree(cold, tmp_path / "cold"), tmp_path / "out"
    tilt(first, out, "train.steps=1", "tilt.kl=1.0")
    tilt(first, tmp_path / "without", "train.steps=1")
    assert load_checkpoint(tmp_path / "without").state["manifest"]["few_step"] is None
    tilt(first, out, "train.steps=2", "tilt.kl=1.0", "run.resume=true")
    start(str(first / "config.yaml"), "run.resume=true", "train.steps=6")  # another reference
    more = ("train.steps=3", "run.resume=true")
    with pytest.raises(ValueError, match=r"its model.few_step \(by its weights\) is \S+, but here"):
        tilt(first, out, "tilt.kl=1.0", *more)
    tilt(first, tmp_path / "without", *more)  # which reads nothing of stage 1
    with_state(out, lambda state: state["manifest"].update(few_step=None))  # an earlier version's
    tilt(first, out, "tilt.kl=1.0", *more)
    assert latest_step(out) == 3
    assert load_checkpoint(out).state["manifest"]["few_step"] is not None

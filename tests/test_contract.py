"""The contract of an export: what it holds, and that `sample` keeps to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students import MERGED, MODELS, PROMPTS, RESOLUTION, TOKENS, Student, request, sampled, student

from tiltflow.data.prompts import Prompt
from tiltflow.formats.contract import Contract, parse_contract, plain_rewards, read_contract
from tiltflow.formats.wanted import Wanted
from tiltflow.models.pipelines.directory import Pipelines
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint, pipeline_fingerprint
from tiltflow.scheduler import CPSFlowMatchScheduler
from tiltflow.tasks.choices import settle
from tiltflow.tasks.depends import asked
from tiltflow.tasks.evaluate import prepare
from tiltflow.tasks.export import export_checkpoint

Tiny = Callable[[str], Path]
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def made(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Student:
    """Trained for 2 steps, η = .5, 48 pixels and 24 tokens, none of which is a default."""
    made = student(tiny_pipeline, "flux1_dev", tmp_path_factory.mktemp("made"))
    config = made.config.model_copy(
        update={
            "sampler": made.config.sampler.model_copy(update={"steps": 2, "eta": 0.5}),
            "model": made.config.model.model_copy(
                update={"resolution": 48, "student_guidance": 2.5}
            ),
        }
    )
    export_checkpoint(config, made.checkpoint, made.export, Wanted(MERGED))
    return replace(made, config=config)


def plain(made: Student, **more: Any) -> Any:
    """A request that says nothing of sampling."""
    return request(made, **{"resolution": None, "seed": 3} | more)


def test_what_it_holds(made: Student) -> None:
    found = json.loads((made.export / "contract.json").read_text())
    assert found["base"]["name"] == "flux_dev"
    assert found["base"]["hash"] == pipeline_fingerprint(made.base)
    expected = {
        "stage": "tilt", "family": "flux", "pipeline": "FluxPipeline", "steps": 2, "eta": 0.5,
        "guidance": 2.5, "resolution": 48, "max_sequence_length": TOKENS, "dtype": "fp32",
    }  # fmt: skip
    for name in ("few_step", "tilt"):
        facts = found["adapters"][name]
        weights = load_file(made.export / name / LORA)
        plain = {key.removeprefix("transformer."): value for key, value in weights.items()}
        assert facts == {"rank": 2, "trained_alpha": 4.0, "hash": adapter_fingerprint(plain)}
    assert {key: found[key] for key in expected} == expected
    levels = found["sigmas"]
    assert len(levels) == 3 and levels[0] == 1 and levels[-1] == 0 and levels[1] > 0.5
    assert set(found["versions"]) == {"tiltflow", "torch", "diffusers", "peft"}
    assert found["recipe"]["stage"] == "tilt"


def test_one_contract_in_header_and_files(made: Student) -> None:
    whole = read_contract(made.export / "few_step")
    assert whole is not None and whole == read_contract(made.export / "tilt")
    for name in ("few_step", "tilt"):
        with safe_open(made.export / name / LORA, framework="pt") as file:
            assert Contract.model_validate_json(file.metadata()["tiltflow"]) == whole
        text = (made.export / name / "contract.json").read_text()
        assert Contract.model_validate_json(text) == whole
    merged = read_contract(made.export / "merged")
    assert merged == whole.model_copy(update={"tilt": 1.0})
    assert read_contract(made.model) is None


def test_sample_is_as_trained(made: Student) -> None:
    told = plain(
        made, steps=2, eta=0.5, resolution=48, max_sequence_length=TOKENS, student_guidance=2.5
    )
    ours = sampled(plain(made))
    assert ours.shape == (2, 3, 48, 48)
    assert torch.equal(ours, sampled(told)) and not told.settled.notes
    assert told.settled == plain(made).settled
    for other in ({"steps": 3}, {"eta": 0.9}, {"student_guidance": 1.0}):
        assert (sampled(plain(made, **other)) - ours).abs().max() > 1e-4, other
    loaded, sampler = prepare(plain(made))
    assert [(s.name, s.nfe) for s in sampler.systems(loaded)][-2:] == [("ac_dmd", 2), ("rtdmd", 2)]


def test_a_merged_pipeline_keeps_to_its_own(made: Student) -> None:
    merged = made.export / "merged"
    ours = sampled(plain(made))
    asked_of = plain(made, model=str(merged), few_step=None, tilt_lora=None)
    assert (sampled(asked_of) - ours).abs().max() < 1e-3
    assert asked_of.settled == replace(plain(made).settled, tilt=1.0)


def test_another_choice_is_said_in_one_line_each(made: Student) -> None:
    notes = plain(made, steps=8, eta=0.5, resolution=64, student_guidance=3.5).settled.notes
    assert notes == (
        "warning: --steps is 8, but the student was trained for 2",
        "warning: --student-guidance is 3.5, but the student was trained for 2.5",
        "warning: --resolution is 64, but the student was trained for 48",
    )


def test_another_base_is_said(made: Student, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made.model, tmp_path / "other"))
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = {key: value * 1.5 for key, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    (note,) = plain(made, model=str(other)).settled.notes
    assert "trained on flux_dev, whose weights have the hash" in note and "\n" not in note


def test_other_text_encoders_are_said(
    tiny_pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in no fingerprint, and an absent one's tokens are zeros."""
    monkeypatch.setitem(MODELS, "sd35m", ("sd3m_without_t5", None))
    made, whole = student(tiny_pipeline, "sd35m", tmp_path), tiny_pipeline("sd3m")
    found = read_contract(made.export / "tilt")
    assert found is not None and found.absent == ("text_encoder_3",)
    assert not plain(made).settled.notes
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.copytree(whole / part, made.model / part)
    index = made.model / "model_index.json"
    without, parts = (
        json.loads(index.read_text()),
        json.loads((whole / "model_index.json").read_text()),
    )
    more = {part: parts[part] for part in ("text_encoder_3", "tokenizer_3")}
    index.write_text(json.dumps(without | more))
    (note,) = plain(made).settled.notes
    said = "the student was trained without text_encoder_3, which"
    assert note == f"warning: {said} {made.model} has"
    export_checkpoint(made.config, made.checkpoint, tmp_path / "with_t5")
    folders = {name: tmp_path / "with_t5" / name for name in ("few_step", "tilt")}
    asked_of = {"few_step": folders["few_step"], "tilt_lora": folders["tilt"]}
    assert not plain(made, **asked_of).settled.notes
    index.write_text(json.dumps(without))
    (note,) = plain(made, **asked_of).settled.notes
    assert note.endswith(f"was trained with text_encoder_3, which {made.model} lacks")


def test_an_earlier_contract_does_not_say_which_encoders(made: Student) -> None:
    text = json.loads((made.export / "contract.json").read_text())
    assert text.pop("absent") == []
    assert Contract.model_validate_json(json.dumps(text)).absent is None


def test_a_tilt_on_another_few_step_adapter_is_said(made: Student, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made.export / "few_step", tmp_path / "other"))
    with safe_open(other / LORA, framework="pt") as file:
        header = dict(file.metadata())
    weights = {key: value + 1e-3 for key, value in load_file(other / LORA).items()}
    save_file(weights, other / LORA, header)
    (note,) = plain(made, few_step=other).settled.notes
    assert note.startswith("warning: the tilt was trained on another few-step adapter")


def test_two_loras_of_different_contracts(made: Student, tmp_path: Path) -> None:
    """The tilt's holds, whose student is the one that is sampled."""
    first = Path(shutil.copytree(made.export / "few_step", tmp_path / "few_step"))
    contract = read_contract(first)
    assert contract is not None
    with safe_open(first / LORA, framework="pt") as file:
        header = dict(file.metadata())
    header["tiltflow"] = contract.model_copy(update={"steps": 8}).text()
    save_file(load_file(first / LORA), first / LORA, header)
    settled = plain(made, few_step=first).settled
    assert settled.steps == 2 and "different sampling" in settled.notes[0]


def test_without_a_contract_the_files_say(made: Student, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    with safe_open(made.export / "few_step" / LORA, framework="pt") as file:
        header = {k: v for k, v in file.metadata().items() if k != "tiltflow"}
    save_file(load_file(made.export / "few_step" / LORA), bare / LORA, header)
    settled = plain(made, few_step=bare, tilt_lora=None).settled
    assert (settled.steps, settled.eta, settled.dtype) == (4, 0.9, "fp32")
    assert settled.guidance is settled.resolution is None and not settled.notes
    half = Path(shutil.copytree(made.model, tmp_path / "half"))
    file = half / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert settle({}, None, Pipelines(str(half))).dtype == "bf16"
    assert settle({}, "fp32", Pipelines(str(half))).dtype == "fp32"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps"), ({"steps": 10**9}, "steps"), ({"eta": float("nan")}, ""),
        ({"eta": 2.0}, "eta"), ({"resolution": "512"}, "resolution"), ({"base": None}, "base"),
        ({"format": "tiltflow-contract-9"}, "format"), ({"guidance": None}, "guidance"),
    ],
)  # fmt: skip
def test_a_contract_that_is_none(made: Student, change: dict[str, Any], said: str) -> None:
    content = json.loads((made.export / "contract.json").read_text()) | change
    with pytest.raises(ValueError, match=rf"F has a contract .*\({said}"):
        parse_contract(json.dumps(content).encode(), "F")
    for text in (b"", b"[]", b"{", b"[" * 100_000, b"\xff"):
        with pytest.raises(ValueError, match="has a contract that cannot be read") as caught:
            parse_contract(text, "F")
        assert "\n" not in str(caught.value)


def test_the_scheduler_holds_it_too(made: Student) -> None:
    scheduler = CPSFlowMatchScheduler.from_pretrained(made.export / "scheduler")
    assert (scheduler.config.steps, scheduler.config.eta) == (2, 0.5)
    scheduler.set_timesteps(2, mu=0.5)
    with pytest.warns(UserWarning, match="trained for 2 steps, not for 28"):
        scheduler.set_timesteps(28, mu=0.5)
    with pytest.raises(ValueError, match="at most 1000, not 1000000000"):
        scheduler.set_timesteps(10**9, mu=0.5)
    with pytest.raises(ValueError, match="10000 is the most"):
        scheduler.seed(0, images=10**9)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="from 1 to 1000"):
            CPSFlowMatchScheduler(steps=steps)


def test_an_evaluation_says_what_was_settled(made: Student) -> None:
    said = asked(plain(made))
    assert (said["steps"], said["eta"], said["resolution"], said["dtype"]) == (2, 0.5, 48, "fp32")
    assert said["student_guidance"] == 2.5
    json.dumps(said)


def test_what_an_evaluation_goes_on_from_is_of_the_same_rewards_and_negative_prompts(
    made: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that a killed one kept are not mixed with those of another reward of the name."""
    monkeypatch.chdir(tmp_path)
    fitted, code = tmp_path / "fitted", tmp_path / "mine_asked.py"
    fitted.mkdir()
    (fitted / "reward.json").write_text("{}")
    code.write_text("def f(images, prompts, metadata): ...\n")
    rewards = {str(fitted): None, "mine_asked:f": None, "clipscore": None}

    def said(negative: str | None = None) -> str:
        prompts = [Prompt(text, {}, negative) for text in PROMPTS]
        return json.dumps(asked(plain(made, prompts=prompts, rewards=rewards)))

    seen = [said(), said("blurred")]
    (fitted / "more").write_bytes(b"1")
    seen.append(said())
    code.write_text("def f(images, prompts, metadata): return images\n")
    seen += [said(), said()]
    assert len(set(seen)) == 4 and seen[-1] == seen[-2]


def test_no_address_or_path_of_a_reward() -> None:
    given = {"clipscore": 1.0, "remote:http://10.0.0.1:8000/hpsv3": 0.5, "/home/me/x.py:mine": 2.0}
    assert plain_rewards(given) == "clipscore × 1, remote:hpsv3 × 0.5, x.py:mine × 2"


def test_text_encoders_never_lie_beside_the_transformer(
    made: Student, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Encoded, dropped, and then the rest is loaded; the second time, the cache has them."""
    from tiltflow.tasks import request as module

    monkeypatch.setenv("TILTFLOW_CACHE", str(tmp_path))
    loaded: list[str] = []
    real = module.load_backbone

    def load(*args: Any, parts: str, **kwargs: Any) -> Any:
        loaded.append(parts)
        return real(*args, parts=parts, **kwargs)

    monkeypatch.setattr(module, "load_backbone", load)
    wanted = plain(made, prompts=[Prompt(text) for text in PROMPTS])
    first = sampled(wanted)
    assert loaded == ["text", "image"]
    assert torch.equal(sampled(plain(made)), first) and loaded == ["text", "image", "image"]
    off = sampled(plain(made, cache="off"))
    assert torch.equal(off, first) and loaded[-2:] == ["text", "image"]
    assert RESOLUTION != 48  # what is not settled by a contract would be this fixture's

"""Exports of full copies (adapters.kind=copies): no tilt apart, and the card's figures theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tiltflow.config.load import RunConfig, load_config
from tiltflow.core.checkpoint import Checkpoint
from tiltflow.core.paths import resolve_path
from tiltflow.data.prompts import Prompt
from tiltflow.evaluation.files import is_of, read_evaluation
from tiltflow.formats.contract import read_contract
from tiltflow.formats.wanted import Wanted
from tiltflow.models.pipelines.fingerprint import adapter_fingerprint
from tiltflow.models.roles import AdapterSettings
from tiltflow.setup.facts import Facts
from tiltflow.tasks.callbacks import Callbacks
from tiltflow.tasks.evaluate import evaluated
from tiltflow.tasks.export import export_checkpoint
from tiltflow.tasks.request import Request

STAGE_1 = Facts("cold_start", AdapterSettings(2, 4.0, "x"), None, 4, 0.9, None, None, None)
COPIES = Facts("tilt", None, None, 4, 0.9, None, {}, None)


def config(out: Path) -> RunConfig:
    return load_config(
        "demo_tilt", ["adapters.kind=copies", "model.few_step=few_step", f"run.out={out}"]
    )


@pytest.mark.parametrize(
    ("facts", "formats", "said"),
    [
        (COPIES, ("merged",), "this run trained full copies .*, which have no tilt apart"),
        (STAGE_1, ("merged",), "this run has no tilt, which stage 2 trains"),
        (STAGE_1, ("diffusers",), "this run has no tilt, which stage 2 trains"),
    ],
)
@pytest.mark.parametrize("strengths", ["0,.5,1.5", "1"])
def test_without_a_tilt_no_strength_is_exported(
    tmp_path: Path, facts: Facts, formats: tuple[str, ...], said: str, strengths: str
) -> None:
    """A checkpoint's state says so by None: the key is there in every run."""
    state = facts.as_json()
    assert state["few_step_adapters"] is None
    with pytest.raises(ValueError, match=f"^{said}: leave --tilt out$"):
        export_checkpoint(
            config(tmp_path),
            Checkpoint(3, {"ema": {}}, state),
            tmp_path / "out",
            Wanted.of(formats, strengths),
        )
    assert not (tmp_path / "out").exists()


class Notices(Callbacks):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def notice(self, text: str) -> None:
        self.lines.append(text)


def copies(seed: int) -> dict[str, Tensor]:
    """The average of a run of copies: the embedded transformer's parameters, moved a little."""
    file = (
        Path(resolve_path("packaged:pipeline")) / "transformer/diffusion_pytorch_model.safetensors"
    )
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight.float() + 0.01 * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(file).items()
        if "pos_embed.pos_embed" not in name  # a buffer
    }


def test_the_card_of_copies_has_their_own_figures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltflow.tasks.export._write_merged", lambda *_: [])  # the long part
    cfg, said = config(tmp_path), Notices()
    first, later = (Checkpoint(3 * i, {"ema": copies(i)}, COPIES.as_json()) for i in (1, 2))
    score = {"nfe": 4, "scores": {"shapes": {"mean": 0.3, "ci95": [0.2, 0.4]}}}
    evaluation = {"prompts": 9, "systems": {"merged": score}, "comparisons": []}

    def card(checkpoint: Checkpoint, **changes: str) -> str:
        figures, out = {**evaluation, **changes}, tmp_path / "out"
        export_checkpoint(cfg, checkpoint, out, Wanted(("merged",)), figures, callbacks=said)
        return (out / "README.md").read_text()

    hashed = adapter_fingerprint(first.tensors["ema"])
    assert "| merged | 4 | 0.3000 [0.2000, 0.4000] |" in card(first, weights=hashed)
    assert said.lines == []
    assert "Not evaluated" in card(later, weights=hashed)
    assert "Not evaluated" in card(first)  # as earlier versions wrote it
    other, unknown = said.lines
    assert other.startswith("evaluation.json is of other weights than this checkpoint's, so the")
    assert unknown.startswith("evaluation.json does not say which weights it is of, so the card")


@pytest.mark.long
def test_an_evaluation_of_copies_says_which_weights_it_is_of(tmp_path: Path) -> None:
    """Of their merged pipeline: the next export of the same checkpoint has its figures."""
    cfg, merged = config(tmp_path), Wanted(("merged",))
    checkpoint = Checkpoint(3, {"ema": copies(1)}, COPIES.as_json())
    export_checkpoint(cfg, checkpoint, tmp_path / "export", merged)
    student = tmp_path / "export" / "merged"
    contract = read_contract(student)
    assert contract is not None and contract.weights == adapter_fingerprint(copies(1))
    request = Request(
        str(student), [Prompt("a red circle on white", {})] * 2, device="cpu", cache="off",
        rewards={"shapes": None},
    )  # fmt: skip
    evaluated(tmp_path / "evaluation.json", request)
    evaluation = read_evaluation(tmp_path)
    assert evaluation["weights"] == contract.weights and "adapters" not in evaluation
    export_checkpoint(cfg, checkpoint, tmp_path / "export", merged, evaluation)
    assert "| merged | 4 |" in (tmp_path / "export" / "README.md").read_text()


def test_an_evaluation_is_of_adapters_as_far_as_it_says_and_of_copies_if_it_says() -> None:
    ours = {"few_step": "a", "tilt": "b"}
    assert is_of({}, ours) and is_of({"adapters": {"few_step": "a"}}, ours)
    assert is_of({"adapters": ours}, {**ours, "tilt": None})
    assert not is_of({"adapters": {"few_step": "c"}}, ours)
    assert is_of({"weights": "d"}, {}, "d")
    assert not any(is_of(of, {}, "d") for of in ({}, {"weights": "e"}, {"adapters": ours}))
    assert not is_of({"weights": "d"}, ours)

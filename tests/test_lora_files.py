"""LoRAs made elsewhere: honoured exactly or refused by name, before any weight loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_helpers import PROMPTS, load, noise
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tiltflow.config.load import load_config
from tiltflow.models.lora_files import read_adapter
from tiltflow.models.pipelines.meta import meta_backbone
from tiltflow.models.roles import adapter_roles
from tiltflow.setup.checks import check_run
from tiltflow.setup.model_checks import start_shapes
from tiltflow.tasks.systems import load_students

Tiny = Callable[[str], Path]
QUERY = "transformer_blocks.0.attn.to_q"
KEY = "lora_adapter_metadata"


def foreign(model: Path, folder: Path, **settings: Any) -> Path:
    """A LoRA as another program's run of PEFT and diffusers leaves it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(str(model), use_safetensors=True)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k"]} | settings)
    generator = torch.Generator().manual_seed(5)
    pipe.transformer.add_adapter(config)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    plain = config.to_dict().items()
    pipe.save_lora_weights(
        str(folder),
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata={
            k: sorted(v) if isinstance(v, set) else v for k, v in plain
        },
    )
    return folder


@pytest.fixture(scope="module")
def plain(tiny_pipeline: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tiny_pipeline("sd3m"), tmp_path_factory.mktemp("plain"))


def rewrite(
    source: Path,
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], Any] = lambda table: None,
    **facts: Any,
) -> Path:
    """The LoRA with other weights and other metadata; `...` removes a fact."""
    file = next(source.glob("*.safetensors"))
    table = load_file(file)
    with safe_open(file, framework="pt") as opened:
        saved = json.loads(opened.metadata()[KEY])
    change(table)
    saved |= {f"transformer.{key}": value for key, value in facts.items()}
    saved = {key: value for key, value in saved.items() if value is not ...}
    folder.mkdir(exist_ok=True)
    save_file(table, folder / file.name, {KEY: json.dumps(saved), "format": "pt"})
    return folder


HONOURED = [
    {},
    {"use_rslora": True},
    {"alpha_pattern": {QUERY: 20}},
    {"rank_pattern": {QUERY: 2, "transformer_blocks.1.attn.to_k": 7}},
    {"rank_pattern": {"attn.to_k": 1}, "alpha_pattern": {"to_q": 9}, "use_rslora": True},
    {"exclude_modules": [QUERY], "alpha_pattern": {r".*1\.attn\.to_k": 1}},
    {"layers_to_transform": [0, 2], "layers_pattern": "transformer_blocks"},
    {"target_modules": r".*attn\.to_(q|v)", "use_rslora": True},
    pytest.param({"lora_dropout": 0.5}, marks=pytest.mark.long),
]


@pytest.mark.parametrize("made", HONOURED, ids=lambda s: "-".join(s) or "plain")
def test_stage_two_starts_where_sample_is(
    tiny_pipeline: Tiny, tmp_path: Path, made: dict[str, Any]
) -> None:
    """The velocity under a frozen stage-1 LoRA is that of diffusers' own reading of the file."""
    model = tiny_pipeline("sd3m")
    folder = foreign(model, tmp_path, **made)
    theirs = load_students(load(model), folder, None).students["ac_dmd"]
    ours = adapter_roles(
        load(model), read_adapter(folder)[0], seed=0, few_step=read_adapter(folder)
    )
    assert ours.reference is not None
    x, level = noise(theirs.backbone, 2), torch.tensor([0.9, 0.4])
    cond = theirs.backbone.encode(PROMPTS)
    with torch.no_grad():
        expected, base = theirs(x, level, cond), ours.teacher(x, level, cond)
        velocity = ours.reference(x, level, cond)
    size = expected.abs().max()
    assert (expected - base).abs().max() > 0.01 * size
    assert (velocity - expected).abs().max() <= 1e-6 * size


@pytest.mark.long
def test_a_dora_has_no_dial(tiny_pipeline: Tiny, plain: Path, tmp_path: Path) -> None:
    """Its magnitudes would stay at strength 0: it goes as trained, and at no other strength."""
    model = tiny_pipeline("sd3m")
    dora = foreign(model, tmp_path, use_dora=True)
    shapes = meta_backbone(model, resolution=64)
    assert "rtdmd" in load_students(shapes, plain, dora).students
    with pytest.raises(ValueError, match=r"LoRA for tilt is .*DoRA.* not at 0\.5"):
        load_students(meta_backbone(model, resolution=64), plain, dora, 0.5)


def test_alpha_tensors(plain: Path, tmp_path: Path) -> None:
    """α as tensors of the file, with metadata that say the same, or none."""
    scales = {QUERY: 3.0}
    names = {n.removeprefix("transformer.").rpartition(".lora_")[0] for n in load_file(
        next(plain.glob("*.safetensors")))}  # fmt: skip
    tensors = {f"transformer.{n}.alpha": torch.tensor(scales.get(n, 6.0)) for n in names}
    only = rewrite(plain, tmp_path / "only", lambda table: table.update(tensors))
    file = next(only.glob("*.safetensors"))
    save_file(load_file(file), file)
    settings, weights = read_adapter(only)
    before = read_adapter(plain)[1]
    assert (settings.rank, settings.alpha) == (4, 4)
    for name in names:
        expected = before[f"{name}.lora_B.weight"] * (scales.get(name, 6.0) / 4)
        assert torch.equal(weights[f"{name}.lora_B.weight"], expected)
    both = rewrite(plain, tmp_path / "both", lambda table: table.update(tensors))
    with pytest.raises(ValueError, match=f"has α 3 for {QUERY}, but 6 in its metadata"):
        read_adapter(both)
    agreeing = rewrite(
        plain, tmp_path / "agreeing", lambda t: t.update(tensors), alpha_pattern={f"^{QUERY}": 3}
    )
    assert torch.equal(read_adapter(agreeing)[1][f"{QUERY}.lora_B.weight"],
                       weights[f"{QUERY}.lora_B.weight"])  # fmt: skip


REFUSED = [
    ({"use_dora": True}, "use_dora"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"target_parameters": ["w"]}, "target_parameters"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"use_qalora": True}, "use_qalora"),
    ({"of_a_later_release": 1}, "of_a_later_release"),
    ({"peft_type": "LOHA"}, "peft_type"),
    ({"r": "four"}, "r: 'four'"),
    ({"r": 8}, "rank 4 for .*, but 8"),
    ({"rank_pattern": {"to_q": 2}}, "rank 4 for .*, but 2"),
    ({"rank_pattern": {"(": 2}}, "rank_pattern"),
    ({"alpha_pattern": [1]}, "alpha_pattern"),
    ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern"),
    ({"lora_alpha": None}, "lora_alpha"),
    ({"lora_alpha": float("nan")}, "lora_alpha"),
    ({"use_rslora": "yes"}, "use_rslora"),
    ({"target_modules": "*("}, "target_modules"),
    ({"target_modules": {"a": 1}}, "target_modules"),
]


@pytest.mark.parametrize(("facts", "said"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_metadata_refused_by_name(
    plain: Path, tmp_path: Path, facts: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=f"has {said}"):
        read_adapter(rewrite(plain, tmp_path / "lora", **facts))


STEM = f"transformer.{QUERY}"
FIRST = f"{STEM}.lora_A.weight"
WEIGHTS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (lambda t: t.update({"text_encoder.a.lora_A.weight": torch.ones(1, 1)}), "of a text encoder"),
    (lambda t: t.update({"lora_te1_a.lora_down.weight": torch.ones(1, 1)}), "of a text encoder"),
    (lambda t: t.update({"lora_unet_a.lora_up.weight": torch.ones(1, 1)}), "no plain .*unet_a"),
    (lambda t: t.update({"transformer.proj_out.weight": torch.ones(1)}), "no plain .*proj_out"),
    (lambda t: t.update({f"{STEM}.lora_magnitude_vector": torch.ones(1)}), "magnitude"),
    (lambda t: t.update({f"{STEM}.lora_B.bias": torch.ones(1)}), r"lora_B\.bias"),
    (lambda t: t.pop(FIRST), f"only a part of the LoRA of {QUERY}"),
    (lambda t: t.update({FIRST: t[FIRST].flatten()}), "do not multiply"),
    (lambda t: t.update({FIRST: t[FIRST][:3]}), "do not multiply"),
    (lambda t: t.update({FIRST: t[FIRST] * float("nan")}), f"{FIRST} with a value that is nan"),
    (lambda t: t.update({FIRST: t[FIRST] / 0}), f"{FIRST} with a value that is inf"),
    (lambda t: t.update({FIRST: t[FIRST].to(torch.int8)}), "in I8, which is no floating"),
    (lambda t: t.clear(), "no weight"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WEIGHTS, ids=lambda v: v if isinstance(v, str) else "")
def test_weights_refused_by_name(
    plain: Path, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    folder = rewrite(plain, tmp_path / "lora", change)
    with pytest.raises(ValueError, match=said):
        read_adapter(folder)


@pytest.fixture
def tilt(
    tiny_pipeline: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """The checks of a stage 2 on the tiny SD3, where loading a weight fails the test."""
    (tmp_path / "p.txt").write_text("a red circle on black\n")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", refuse)
    monkeypatch.setattr("tiltflow.models.pipelines.loading.load_part", refuse)

    def config(lora: Path, *more: str) -> Any:
        return load_config(
            "demo_tilt",
            [
                f"model.path={tiny_pipeline('sd3m')}", f"model.few_step={lora}", "run.device=cpu",
                f"data.prompts={tmp_path / 'p.txt'}", "data.eval_prompts=null",
                "model.resolution=64", *more,
            ],
        )  # fmt: skip

    return config


def test_a_lora_of_another_model_is_found_before_weights_load(
    plain: Path, tmp_path: Path, tilt: Callable[..., Any]
) -> None:
    assert check_run(tilt(plain)).prompts.train

    def widen(table: dict[str, torch.Tensor]) -> None:
        for key in table:
            table[key] = torch.ones(4, 128) if ".lora_A" in key else torch.ones(128, 4)

    wider = rewrite(plain, tmp_path / "wider", widen)
    with pytest.raises(ValueError, match=r"model\.few_step=.*wider does not fit .*\(4, 128\)"):
        check_run(tilt(wider))

    def deeper(table: dict[str, torch.Tensor]) -> None:
        for key in list(table):
            table[key.replace("blocks.0", "blocks.9")] = table[key].clone()

    with pytest.raises(ValueError, match=r"model\.few_step=.*deeper does not fit .*blocks\.9"):
        check_run(tilt(rewrite(plain, tmp_path / "deeper", deeper)))


@pytest.mark.parametrize("targets", ["*(", "no_such_module"])
def test_targets_that_are_none(plain: Path, tilt: Callable[..., Any], targets: str) -> None:
    with pytest.raises(ValueError, match=r"adapters\.targets|no_such_module") as error:
        check_run(tilt(plain, f"adapters.targets='{targets}'"))
    assert "\n" not in str(error.value)


def test_a_run_is_looked_at_by_its_headers(
    tiny_pipeline: Tiny, plain: Path, tilt: Callable[..., Any], tmp_path: Path
) -> None:
    from tiltflow.core.checkpoint import save_checkpoint

    settings, weights = read_adapter(plain)
    state = {"stage": "cold_start", "adapters": vars(settings), "step": 1}
    groups = {"ema": weights, "fake_score": weights, "generator": weights}
    save_checkpoint(tmp_path / "run", 1, groups, state, keep=1)
    found = start_shapes(tmp_path / "run")
    assert found.settings == settings
    assert {n: (v.shape, v.device.type) for n, v in found.few_step.items()} == {
        n: (v.shape, "meta") for n, v in weights.items()
    }
    assert check_run(tilt(tmp_path / "run")).prompts.train

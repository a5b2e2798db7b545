"""The memory planner against storages counted in real iterations of the tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from students import student
from test_train import redness  # noqa: F401  (a reward by dotted path)
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiltflow.config.load import RunConfig, load_config
from tiltflow.data.embeddings import BATCH
from tiltflow.models.families import load_backbone
from tiltflow.models.pipelines.meta import meta_backbone, text_encoders
from tiltflow.setup.build import Build, build_stage
from tiltflow.setup.planner import GIB, OVERHEAD, Plan
from tiltflow.setup.tally import Tally
from tiltflow.tasks.doctor import show_plan
from tiltflow.tasks.plans import differentiated, encoding_numbers, plan_recipe

Tiny = Callable[[str], Path]


def config(tiny: Tiny, name: str, stage: str, kind: str, out: Path, *more: str) -> RunConfig:
    (out / "prompts.txt").write_text("a cat\na dog\na bird\na fish\n")
    models = {
        "sd35m": ("sd35m", None),
        "flux1_dev": ("flux_dev", None),
        "flux2_klein_4b": ("klein_base", "klein"),
    }
    model, generator = models[name]
    values = [
        f"model.path={tiny(model)}",
        f"model.generator_path={tiny(generator) if generator else 'null'}",
        "model.resolution=64", "model.dtype=fp32", "model.max_sequence_length=24",
        f"adapters.kind={kind}", "adapters.rank=4", "train.batch_size=8",
        "train.micro_batch_size=4", f"data.prompts={out / 'prompts.txt'}",
        "run.device=cpu", f"run.out={out / 'run'}", "run.seed=0",
    ]  # fmt: skip
    if stage == "tilt":
        values += ["tilt.group_size=4", "watch.rewards={}"]
        values += ["rewards={'test_train:redness': {weight: 1.0, options: {differentiable: true}}}"]
        values += [f"model.few_step={few_step(tiny, name, out, kind)}"]
    else:
        values += ["cold_start.generator_every=1"]
    return load_config(f"{name}_{stage}", [*values, *more])


def few_step(tiny: Tiny, name: str, out: Path, kind: str) -> Path:
    if kind == "lora":
        return student(tiny, name, out / "student").export / "few_step"
    from tiltflow.tasks.train import run_training

    run_training(
        config(tiny, name, "cold_start", kind, out, "train.steps=1", f"run.out={out / 'cold'}"),
        Console(quiet=True),
    )
    return out / "cold"


def measured(build: Build) -> int:
    """Bytes at the worst moment of an iteration: what stands, and the storages made meanwhile."""
    backbone, stage = build.backbone, build.stage
    with sdpa_kernel(SDPBackend.MATH):
        stage.iteration(0)  # the optimizers' states exist from here on
        modules = [backbone.student_base, backbone.teacher_base, backbone.vae]  # type: ignore[attr-defined]
        roles = stage.roles
        modules += [r.network for r in (roles.generator, roles.fake_score, roles.ema)]
        modules += [roles.reference.network] if roles.reference else []
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        for updater in stage.updaters.values():
            for state in updater.optimizer.state.values():
                tensors += [v for v in state.values() if isinstance(v, torch.Tensor)]
        standing = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        # the prompts' tables lie in main memory, which on a GPU is not the device's
        tables = [t for table in build.prompts.tables for side in (table.positive, table.negative)
                  for t in side.values()]  # fmt: skip
        with Tally(*tensors, *tables) as tally:
            stage.iteration(1)
    return sum(standing.values()) + tally.peak


CASES = [
    ("sd35m", "cold_start", "lora", "true"),
    pytest.param("sd35m", "cold_start", "keep_graph", "false", marks=pytest.mark.long),
    pytest.param("sd35m", "cold_start", "keep_graph", "[fake_score]", marks=pytest.mark.long),
    pytest.param("sd35m", "cold_start", "lora", "[generator]", marks=pytest.mark.long),
    pytest.param("sd35m", "cold_start", "one sample", "false", marks=pytest.mark.long),
    pytest.param("sd35m", "tilt", "keep_graph", "false", marks=pytest.mark.long),
    pytest.param("sd35m", "tilt", "keep_graph everywhere", "false", marks=pytest.mark.long),
    pytest.param("flux1_dev", "cold_start", "fp8", "true", marks=pytest.mark.long),
    pytest.param("flux1_dev", "tilt", "lora", "false", marks=pytest.mark.long),
    pytest.param("sd35m", "tilt", "copies", "true", marks=pytest.mark.long),
    pytest.param("flux2_klein_4b", "tilt", "lora", "true", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "stage", "kind", "checkpointing"), CASES)
def test_plan_is_within_15_percent_of_what_is_measured(
    tiny_pipeline: Tiny, tmp_path: Path, name: str, stage: str, kind: str, checkpointing: str
) -> None:
    more = [f"model.gradient_checkpointing={checkpointing}"]
    if kind == "fp8":  # LoRA's base in 8 bits
        kind, more = "lora", [*more, "model.base_storage=fp8", "model.dtype=bf16"]
    if kind == "keep_graph everywhere":
        more += ["tilt.match_steps=all", "tilt.policy_weight=0"]
    if kind.startswith("keep_graph"):
        kind, more = "lora", [*more, f"{stage}.keep_graph=true"]
        more += ["cold_start.fresh_boundary=false"] if stage == "cold_start" else []
    if kind == "one sample":
        kind, more = "lora", [*more, "cold_start.consistency_form=one_sample"]
    if kind == "copies":
        more.append("adapters.init_std=null")
        more += ["tilt.fake_score_start=continued"] if stage == "tilt" else []
    cfg = config(tiny_pipeline, name, stage, kind, tmp_path, *more)
    made = plan_recipe(cfg)
    build = build_stage(cfg)
    build.backbone.free_text_encoders()
    real = measured(build)
    print(f"PLAN {name} {stage} {kind} {checkpointing}: {made.peak / real:.3f} ({made.worst})")
    assert made.peak == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ([], 3),
        (["tilt.policy_weight=0"], 1),
        (["tilt.match_steps=random"], 4),
        (["tilt.match_steps=random", "tilt.policy_weight=0"], 2),
        (["tilt.match_steps=all", "tilt.policy_weight=0"], 4),
        (["tilt.match_steps=all", "tilt.policy_weight=0", "tilt.matching_weight=0"], 1),
        (["tilt.reward_steps=2", "tilt.subset=1", "tilt.match_steps=random"], 4),
        (["tilt.reward_weight=0", "tilt.match_steps=random", "tilt.subset=1"], 2),
    ],
)
def test_the_steps_whose_graphs_may_be_kept_are_all_that_a_term_looks_at(
    more: list[str], steps: int
) -> None:
    """A step of the policy gradient, those of the rewards, and wherever the teacher is matched."""
    own = ["data.prompts=x", "model.few_step=y", "rewards={clipscore: 1.0}", *more]
    assert differentiated(load_config("sd35m_tilt", own)) == steps


@pytest.mark.parametrize("name", ["krea2", "z_image", "klein", "sd3m"])
def test_the_states_of_text_encoders_are_counted(tiny_pipeline: Tiny, name: str) -> None:
    """But for a template's tokens, which are few beside a prompt's."""
    path, tokens, seen = tiny_pipeline(name), 256, []
    backbone = load_backbone(path, device="cpu", max_sequence_length=tokens)
    for part in backbone.record.keeps_states:  # type: ignore[attr-defined]
        encoder = getattr(backbone.pipe, part)  # type: ignore[attr-defined]
        encoder.register_forward_hook(
            lambda _, __, out: seen.append(sum(state.numel() for state in out.hidden_states))
        )
    rows = 1 if backbone.ragged else BATCH  # type: ignore[attr-defined]
    made = backbone.encode(["long " * tokens] * rows)
    encoders = text_encoders(path)
    shapes = meta_backbone(path, max_sequence_length=tokens)
    weights = sum(p.numel() for encoder in encoders.values() for p in encoder.parameters())
    out = sum(value.numel() for value in made.positive.values())
    planned = encoding_numbers(shapes, encoders) - weights - out
    assert planned == pytest.approx(max(seen), rel=0.25) and planned > 0


def test_plan_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    made = Plan({"base weights": 20 * GIB}, {"rollout": GIB, "generator": 2 * GIB}, 21 * GIB)
    assert (made.worst, made.peak) == ("generator", 22 * GIB)
    assert made.fits(22 * GIB + OVERHEAD) and not made.fits(22 * GIB + OVERHEAD - 1)
    show_plan(made, 23.0, Console())
    assert "does not fit into 23.0 GiB" in capsys.readouterr().out
    encoding = Plan({"base weights": GIB}, {"rollout": GIB}, 30 * GIB)
    assert not encoding.fits(24 * GIB)


def test_a_backbone_of_shapes_only(tiny_pipeline: Tiny) -> None:
    made = meta_backbone(tiny_pipeline("flux_dev"), resolution=64, max_sequence_length=24)
    assert all(p.is_meta for p in made.teacher_base.parameters())
    assert made.latent_shape == (16, 8, 8) and made.decode(
        torch.empty(2, 16, 8, 8, device="meta")
    ).shape == (2, 3, 64, 64)
    assert made.conditioning_shapes() == {
        "prompt_embeds": (24, 32), "pooled_prompt_embeds": (32,)
    }  # fmt: skip
    with pytest.raises(ValueError, match="there is no directory"):
        meta_backbone("black-forest-labs/FLUX.2-klein-14B")

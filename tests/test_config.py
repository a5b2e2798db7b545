"""The configuration: strictness, cross checks, the sentences, and the files it names."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tiltflow.config import recipe_source
from tiltflow.config.load import (
    RewardConfig,
    RunConfig,
    config_keys,
    dump_config,
    list_recipes,
    load_config,
    validate_files,
)

COLD = """
stage: cold_start
model: {path: org/model}
data: {prompts: shapes-train}
train: {steps: 100, batch_size: 72, micro_batch_size: 9, generator_lr: 3e-5, fake_score_lr: 3e-5}
"""
TILT = """
stage: tilt
model: {path: org/model, few_step: runs/cold}
data: {prompts: shapes-train}
train: {steps: 10, batch_size: 48, generator_lr: 3e-6, fake_score_lr: 1e-6, betas: [0.9, 0.99]}
rewards:
  clip: 1
  aesthetic: {weight: 0.5, backprop: false, options: {layer: 2}}
watch:
  rewards: {hps: 0}
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two recipes and one asset, in place of the real one."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "assets" / "demo").mkdir(parents=True)
    (tmp_path / "recipes" / "demo_cold_start.yaml").write_text(COLD)
    (tmp_path / "recipes" / "demo_tilt.yaml").write_text(TILT)
    monkeypatch.setattr(recipe_source, "RECIPES", tmp_path / "recipes")
    return tmp_path


def refusal(recipe: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(recipe, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_published_values(recipes: Path) -> None:
    cold, tilt = load_config("demo_cold_start"), load_config("demo_tilt")
    assert (cold.sampler.steps, cold.sampler.eta) == (4, 0.9)
    assert (cold.adapters.kind, cold.adapters.rank, cold.adapters.alpha) == ("lora", 32, 64.0)
    assert (cold.cold_start.generator_every, cold.cold_start.consistency) == (10, 0.01)
    assert cold.cold_start.consistency_max_delta == 200
    assert (cold.train.betas, cold.train.clip, cold.train.ema) == ((0.9, 0.999), 1.0, 0.99)
    assert (tilt.tilt.group_size, tilt.tilt.subset, tilt.tilt.clip_range) == (24, 2, 1e-5)
    assert (tilt.tilt.matching_weight, tilt.tilt.reward_weight) == (1e-3, 1e-4)
    assert (tilt.tilt.reward_target, tilt.tilt.advantage_clip, tilt.tilt.kl) == (3.0, 5.0, 0.0)
    assert cold.run.out == "runs/demo_cold_start"


def test_values_are_read(recipes: Path) -> None:
    config = load_config("demo_tilt")
    assert config.train.generator_lr == 3e-6 and config.train.betas == (0.9, 0.99)
    assert config.rewards["clip"] == RewardConfig(weight=1.0)
    assert config.rewards["aesthetic"] == RewardConfig(
        weight=0.5, backprop=False, options={"layer": 2}
    )
    assert config.watch.rewards["hps"].weight == 0.0


def test_overrides(recipes: Path) -> None:
    config = load_config(
        "demo_tilt",
        [
            "train.steps=2",
            "train.generator_lr=1e-4",
            "model.few_step=runs/a=b",
            "adapters.targets=[to_q, to_k]",
            "rewards.clip.weight=2",
            "rewards.my.module:Sharp=0.5",
            "rewards.my.module:Sharp.options.size=3",
            "watch.rewards.ocr=1",
            "run.resume=true",
            "log.every=1",
        ],
    )
    assert config.train.steps == 2 and config.train.generator_lr == 1e-4
    assert config.model.few_step == "runs/a=b"
    assert config.adapters.targets == ("to_q", "to_k")
    assert config.rewards["clip"].weight == 2.0
    assert config.rewards["my.module:Sharp"] == RewardConfig(weight=0.5, options={"size": 3})
    assert config.watch.rewards["ocr"].weight == 1.0
    assert config.run.resume and config.log.every == 1


def test_the_documented_command_works_on_a_recipe_for_a_large_batch(recipes: Path) -> None:
    """DESIGN §3's example: a batch below the recipe's micro-batch goes through in one piece."""
    config = load_config("demo_cold_start", ["train.batch_size=2", "model.resolution=64"])
    assert config.train.micro == 2
    assert load_config("demo_cold_start").train.micro == 9
    assert load_config("demo_tilt").train.micro == 48


@pytest.mark.parametrize("recipe", ["demo_cold_start", "demo_tilt"])
def test_dump_loads_back_equal(recipes: Path, tmp_path: Path, recipe: str) -> None:
    config = load_config(recipe, ["run.seed=3", "adapters.targets=[a]", "train.clip=1e-7"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config
    assert ("tilt" in yaml.safe_load(path.read_text())) == (config.stage == "tilt")


def test_configs_are_frozen(recipes: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config("demo_tilt").train.steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", "unknown key train.step; the nearest is train.steps"),
        ("train.batchsize=3", "unknown key train.batchsize; the nearest is train.batch_size"),
        ("steps=3", "unknown key steps; the nearest is train.steps"),
        ("tilit={a: 1}", "unknown key tilit; the nearest is tilt"),
        ("tilt.grup_size=3", "unknown key tilt.grup_size; the nearest is tilt.group_size"),
        (
            "rewards.clip.wieght=1",
            "unknown key rewards.clip.wieght; the nearest is rewards.clip.weight",
        ),
        ("train={steps: x, str: 3}", "unknown key train.str; the nearest is train."),
        ("train.steps=x", "train.steps is 'x', but it should be a valid integer"),
        ("train.steps=4.0", "train.steps is 4.0, but it should be a valid integer"),
        ("train.steps=true", "train.steps is True, but it should be a valid integer"),
        ("train.steps='4'", "train.steps is '4', but it should be a valid integer"),
        ("train.steps=0", "train.steps is 0, but it should be greater than or equal to 1"),
        ("train.clip=.nan", "train.clip is nan, but it should be a finite number"),
        ("train.clip=.inf", "train.clip is inf, but it should be a finite number"),
        ("train.betas=[.9]", "train.betas is [0.9], but it should hold more values"),
        ("train.generator_lr=0", "train.generator_lr is 0, but it should be greater than 0"),
        ("train=3", "train is 3, but it should be a mapping of keys to values"),
        ("train.steps.x=1", "train.steps is 10, so it has no x"),
        (
            "model.family=foo",
            "model.family is 'foo', but it should be 'sd3', 'flux', 'flux2', 'flux2_dev', "
            "'z_image', 'sana', 'chroma', 'qwen_image', 'qwen_image_21', 'krea2', 'wan' or "
            "'mixture'",
        ),
        ("rewards.clip=abc", "rewards.clip is 'abc', but it should be a number or a mapping"),
        ("sampler.eta=1.5", "sampler.eta is 1.5, but it should be less than or equal to 1"),
        ("run.device='cpu:x'", "run.device is 'cpu:x', but it should be auto, cpu"),
        ("data.prompts=''", "data.prompts is '', but it should have at least 1 character"),
        ("data.prompts=[a", "the value of data.prompts, line 1: expected"),
        ("model.path=!!python/object:os.system x", "tags, anchors and aliases are not allowed"),
        ("model={path: &a b, few_step: *a}", "tags, anchors and aliases are not allowed"),
        ("rewards={a: 1, a: 2}", "the key 'a' stands twice"),
        ("rewards={[a]: 1}", "a key is no text"),
        ("verbose", "the override 'verbose' should read key=value"),
        ("=3", "the override '=3' should read key=value"),
    ],
)
def test_bad_overrides_are_refused(recipes: Path, override: str, message: str) -> None:
    assert message in refusal("demo_tilt", override)


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("demo_cold_start", ["model.resolution=60"], "model.resolution is 60"),
        ("demo_cold_start", ["model.family=mixture"], "needs model.path mixture"),
        (
            "demo_cold_start",
            ["model.path=mixture", "model.family=sd3"],
            "model.path mixture needs model.family mixture, not sd3",
        ),
        ("demo_cold_start", ["rewards.clip=1"], "put them under watch.rewards"),
        ("demo_cold_start", ["tilt.subset=1"], "the section tilt is given, but stage is cold_st"),
        ("demo_tilt", ["cold_start.consistency=0"], "the section cold_start is given, but stage"),
        ("demo_tilt", ["model.few_step="], "stage tilt needs model.few_step"),
        ("demo_tilt", ["rewards="], "at least one reward"),
        ("demo_tilt", ["rewards.clip=0"], "rewards.clip has weight 0"),
        ("demo_tilt", ["train.batch_size=50"], "tilt.group_size 24 does not divide train.batch"),
        ("demo_tilt", ["train.micro_batch_size=16"], "must divide tilt.group_size 24 or be a mul"),
        ("demo_tilt", ["tilt.subset=4"], "tilt.subset 4 is more than the 3 stochastic steps"),
        (
            "demo_tilt",
            ["tilt.subset=2", "tilt.reward_steps=3"],
            "the 1 stochastic step of sampler.steps 4 that tilt.reward_steps 3 leaves",
        ),
        ("demo_tilt", ["tilt.reward_steps=5"], "tilt.reward_steps 5 is more than sampler.steps 4"),
        ("demo_tilt", ["tilt.subset=0"], "tilt.subset is 0"),
        ("demo_tilt", ["sampler.eta=0"], "sampler.eta 0 makes every step deterministic"),
        ("demo_tilt", ["tilt.kl=1", "tilt.policy_weight=0"], "tilt.kl 1 is a part of the policy's"),
        (
            "demo_tilt",
            ["tilt.policy_weight=0", "tilt.matching_weight=0", "tilt.reward_weight=0"],
            "are all 0",
        ),
    ],
)
def test_values_that_do_not_go_together(
    recipes: Path, recipe: str, overrides: list[str], words: str
) -> None:
    assert words in refusal(recipe, *overrides)


@pytest.mark.parametrize(
    "override",
    [
        "tilt.subset=3",
        "train.micro_batch_size=12",
        "train.micro_batch_size=24",
        "train.micro_batch_size=96",
        "train.micro_batch_size=4",
        "train.batch_size=24",
        "rewards.clip=-1",
    ],
)
def test_values_at_the_edge_are_taken(recipes: Path, override: str) -> None:
    load_config("demo_tilt", [override])


REQUIRED = {
    "stage": "VALUE", "model.path": "DIR", "data.prompts": "FILE", "train.generator_lr": "VALUE",
}  # fmt: skip


def without(tmp_path: Path, *parts: str) -> str:
    """The refusal of `COLD` without a key or a section."""
    raw = yaml.load(COLD, yaml.BaseLoader)
    *inside, last = parts
    del (raw[inside[0]] if inside else raw)[last]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw).replace("'", ""))
    return refusal(str(path))


@pytest.mark.parametrize("key", REQUIRED)
def test_required_keys(tmp_path: Path, key: str) -> None:
    said = without(tmp_path, *key.split("."))
    assert said == f"{key} is not set: add it to the recipe, or give {key}={REQUIRED[key]}"


@pytest.mark.parametrize(
    ("section", "key"),
    [("model", "model.path=DIR"), ("data", "data.prompts=FILE"), ("train", "train.steps=VALUE")],
)
def test_a_missing_section_names_the_full_key(tmp_path: Path, section: str, key: str) -> None:
    said = without(tmp_path, section)
    assert said.startswith(f"{key.partition('=')[0]} is not set") and said.endswith(f"give {key}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "should hold a mapping"),
        ("- a", "should hold a mapping"),
        ("a: [", "line 1"),
        ("stage: tilt\nstage: tilt\n", "line 2: the key 'stage' stands twice"),
        ("a: 1\n---\nb: 2\n", "line 2"),
        ("stage: !!str tilt", "tags, anchors"),
        ("a: " + "[" * 1200, "nested too deeply"),
    ],
)
def test_bad_recipe_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refusal(str(path))
    assert words in message and str(path) in message


def test_recipes_are_found_or_the_nearest_is_named(recipes: Path, tmp_path: Path) -> None:
    assert list_recipes() == ["demo_cold_start", "demo_tilt"]
    assert refusal("demo_tlit") == "unknown recipe 'demo_tlit'; the nearest is demo_tilt"
    (tmp_path / "config.yaml").touch()
    named = f"{tmp_path} is a run directory: its recipe is {tmp_path}/config.yaml"
    assert refusal(str(tmp_path)) == named
    assert refusal("nowhere.yaml") == "there is no recipe file nowhere.yaml"
    path = tmp_path / "mine.yaml"
    path.write_bytes(COLD.encode() + b"# \xff")
    assert "is not UTF-8" in refusal(str(path))
    path.write_text(COLD + "rewards:\nwatch:\n")
    assert load_config(str(path)).run.out == "runs/mine"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-5", 3e-5),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("10", 10),
        ("010", "010"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'3'", "3"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    got = recipe_source.parse_yaml(text, "here")
    assert got == value and type(got) is type(value)


def test_config_keys_hold_every_leaf() -> None:
    keys = config_keys()
    assert {"stage", "model.path", "rewards.NAME", "watch.rewards.NAME.weight"} <= set(keys)
    assert {"train.micro_batch_size", "run.out", "checkpoint.every", "tilt.kl"} <= set(keys)
    assert len(keys) == len(set(keys))


@pytest.fixture
def whole(tiny_pipeline: Callable[[str], Path], tmp_path: Path) -> Path:
    """A pipeline's directory that a test may damage."""
    return shutil.copytree(tiny_pipeline("sd3m"), tmp_path / "model")


def cold(model: Path | str, *overrides: str) -> RunConfig:
    return load_config("demo_cold_start", [f"model.path={model}", *overrides])


def test_files_that_are_there_pass(recipes: Path, tmp_path: Path, whole: Path) -> None:
    validate_files(cold(whole))
    validate_files(cold("org/model"))
    validate_files(cold("mixture", "data.prompts=mixture"))
    run = tmp_path / "run" / "checkpoints" / "latest"
    run.mkdir(parents=True)
    validate_files(load_config("demo_tilt", [f"model.few_step={tmp_path / 'run'}"]))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").touch()
    validate_files(load_config("demo_tilt", [f"model.few_step={tmp_path / 'lora'}"]))


def test_what_a_pipeline_lacks_is_listed(recipes: Path, tmp_path: Path, whole: Path) -> None:
    def message(model: Path | str, *overrides: str) -> str:
        with pytest.raises(ValueError) as caught:
            validate_files(cold(model, *overrides))
        return str(caught.value)

    (whole / "vae" / "config.json").unlink()
    (whole / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    lacking = message(whole)
    assert lacking.startswith("model.path: ") and "vae/config.json" in lacking
    assert "transformer/diffusion_pytorch_model.safetensors" in lacking
    assert "not one of family flux" in message(whole, "model.family=flux")
    (whole / "model_index.json").write_text("{")
    assert "is not valid JSON" in message(whole)
    (whole / "model_index.json").unlink()
    assert "holds no model_index.json" in message(whole)
    assert "there is no directory" in message(recipes / "recipes" / "demo_tilt.yaml")
    assert "does not exist, and is no hub id" in message("./missing")
    assert "does not exist, and is no hub id" in message(tmp_path / "missing")
    assert "model.generator_path ./b does not" in message("org/a", "model.generator_path=./b")
    assert "there is no packaged 'x'" in message("packaged:x")


def test_other_files_that_are_missing(recipes: Path, tmp_path: Path) -> None:
    def message(*overrides: str) -> str:
        with pytest.raises(ValueError) as caught:
            validate_files(load_config("demo_tilt", overrides))
        return str(caught.value)

    (tmp_path / "cold").mkdir()
    there = f"model.few_step={tmp_path / 'cold'}"
    assert "runs/nothing is no directory: train stage cold_start" in message(
        "model.few_step=runs/nothing"
    )
    assert "neither checkpoints/latest nor LoRA weights" in message(there)
    (tmp_path / "cold" / "x.safetensors").touch()
    assert "rewards.clip.path ./c does not exist" in message(there, "rewards.clip.path=./c")
    assert "there is no file nowhere.txt" in message(there, "data.prompts=nowhere.txt")
    (tmp_path / "empty.txt").touch()
    eval_prompts = f"data.eval_prompts={tmp_path / 'empty.txt'}"
    assert "has no prompts in it" in message(there, eval_prompts)

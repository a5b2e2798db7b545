"""Real text encoders and the cache: same bits, loaded apart, and never run twice over two runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_pipelines import BUILDERS, RESOLUTION, TOKENS

from tiltflow.config import load as config
from tiltflow.core.checkpoint import load_checkpoint
from tiltflow.data import prompts
from tiltflow.data.embedding_cache import EmbeddingCache, EncoderKey, encode_cached
from tiltflow.data.embeddings import EncodedPrompts, encode_prompts
from tiltflow.data.prompts import Prompt
from tiltflow.models.backbone import Parts
from tiltflow.models.families import load_backbone
from tiltflow.models.families.sd3 import SD3Backbone
from tiltflow.models.pipelines import loading
from tiltflow.setup import build
from tiltflow.tasks.encode import encode_recipe
from tiltflow.tasks.train import run_training

Tiny = Callable[[str], Path]
QUIET = Console(quiet=True)
TEXTS = ["a red cat", "two dogs", "a cat", "x" * 60, "a", "blue", "ten birds in a tree"]
CPU = torch.device("cpu")


def load(path: Path, parts: Parts = "all", **options: Any) -> Any:
    options = {"resolution": RESOLUTION, "max_sequence_length": TOKENS} | options
    return load_backbone(path, device="cpu", parts=parts, **options)


def rows(tables: Any, places: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    chosen = tuple(Prompt(text) for text in texts)
    cond, _ = EncodedPrompts(chosen, tables, tuple(places[t] for t in texts)).select(
        range(len(texts)), CPU
    )
    return {**cond.positive, **{f"negative {key}": value for key, value in cond.negative.items()}}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd3m", "sd3m_without_t5", "flux_dev", "klein_base"])
def test_cached_embeddings_are_the_uncached_ones(
    tiny_pipeline: Tiny, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """Difference 0, also where what is asked for was encoded in other company before."""
    path = tiny_pipeline(name)
    whole = load(path, dtype=dtype)
    uncached = encode_prompts(whole, [Prompt(text) for text in TEXTS], 4)
    expected = rows(uncached.tables, dict(zip(TEXTS, uncached.places, strict=True)), TEXTS)
    for folder, earlier in (("cold", []), ("mixed", [TEXTS[5], "other", TEXTS[1], TEXTS[6]])):
        cache = EmbeddingCache(tmp_path / folder, EncoderKey(name, {}))

        def text_only() -> Any:
            return load(path, "text", dtype=dtype)

        if earlier:
            encode_cached(cache, earlier, text_only, batch_size=4)
        for _ in range(2):
            found = encode_cached(cache, TEXTS, text_only, batch_size=4)
            assert same(rows(found.tables, found.places, TEXTS), expected)


@pytest.mark.parametrize("name", BUILDERS)
def test_parts_of_a_pipeline(tiny_pipeline: Tiny, name: str) -> None:
    path = tiny_pipeline(name)
    whole, text, image = (load(path, parts) for parts in ("all", "text", "image"))
    cond = text.encode(TEXTS[:2])
    expected = whole.encode(TEXTS[:2])
    assert same(dict(cond.positive), dict(expected.positive))
    assert same(dict(cond.negative), dict(expected.negative))
    assert text.vae is None and all(p.is_meta for p in text.transformer.parameters())
    assert all(getattr(image.pipe, part) is None for part in image.record.text_encoders)
    with pytest.raises(RuntimeError, match="text encoders were freed"):
        image.encode(TEXTS[:2])
    x, sigma = torch.ones(2, *image.latent_shape), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        v = [b.velocity(b.teacher_base, x, sigma, cond, b.guidance) for b in (whole, image)]
        assert torch.equal(*v) and torch.equal(whole.decode(x), image.decode(x))
    assert torch.equal(whole.few_step_sigmas(4), image.few_step_sigmas(4))


class Counts:
    """How many texts were encoded, which parts were loaded, and how often a file was read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.parts: list[str] = []
        self.files: list[str] = []
        encode, part, read = SD3Backbone._encode, loading.load_part, prompts.load_prompts

        def counted_encode(backbone: Any, texts: list[str]) -> Any:
            self.texts += [text for text in texts if text]
            return encode(backbone, texts)

        def counted_part(root: Path, name: str, dtype: torch.dtype, empty: bool = False) -> Any:
            self.parts.append(name)
            return part(root, name, dtype, empty)

        def counted_read(source: Any, *more: Any) -> Any:
            self.files.append(Path(source).name)
            return read(source, *more)

        monkeypatch.setattr(SD3Backbone, "_encode", counted_encode)
        monkeypatch.setattr(loading, "load_part", counted_part)
        monkeypatch.setattr(config, "load_prompts", counted_read)

    def clear(self) -> None:
        for counted in (self.texts, self.parts, self.files):
            counted.clear()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    yield Counts(monkeypatch)


@pytest.fixture
def settings(tiny_pipeline: Tiny, tmp_path: Path) -> Callable[..., Any]:
    """Overrides of a training run of two steps, with three prompts and two held-out ones."""
    (tmp_path / "train.txt").write_text("a cat\na dog\na red bird\na cat\n")
    (tmp_path / "held_out.txt").write_text("a dog\na fish\n")

    def make(out: str, *more: str, model: Path | None = None) -> Any:
        values = [
            f"model.path={model or tiny_pipeline('sd35m')}", "model.autocast=null",
            "model.max_sequence_length=8", "adapters.rank=2",
            f"data.prompts={tmp_path / 'train.txt'}",
            f"data.eval_prompts={tmp_path / 'held_out.txt'}",
            f"data.cache={tmp_path / 'cache'}", "train.batch_size=2", "train.steps=2",
            "watch.rewards={}", "log.samples_every=2", "log.samples=2", "run.device=cpu",
            f"run.out={tmp_path / out}", "cold_start.generator_every=1", *more,
        ]  # fmt: skip
        return config.load_config("demo_cold_start", values)

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_checkpoint(run).tensors
    return {f"{group}/{k}": v for group, table in tensors.items() for k, v in table.items()}


@pytest.mark.long
def test_training_never_encodes_twice(
    settings: Callable[..., Any], counts: Counts, tmp_path: Path
) -> None:
    first = run_training(settings("first"), QUIET)
    assert sorted(counts.texts) == ["a cat", "a dog", "a fish", "a red bird"]
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert counts.parts == [*encoders, "transformer", "vae"]
    assert counts.files == ["train.txt", "held_out.txt"]
    counts.clear()
    second = run_training(settings("second"), QUIET)
    assert counts.texts == [] and counts.parts == ["transformer", "vae"]
    third = run_training(settings("third", "data.cache=off"), QUIET)
    assert len(counts.texts) == 4
    assert same(weights(first), weights(second)) and same(weights(first), weights(third))
    assert (tmp_path / "first" / "samples" / "step-000002.png").is_file()


def test_the_command_encodes_for_training(
    settings: Callable[..., Any], counts: Counts, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_recipe(settings("run"), Console(width=200))
    said = capsys.readouterr().out
    assert "encoding 4 prompts, 0 are cached" in said and "prompt_embeds: (4, 24, 64)" in said
    counts.clear()
    run_training(settings("run"), QUIET)
    assert counts.texts == []
    with pytest.raises(ValueError, match=r"data\.cache is off"):
        encode_recipe(settings("run", "data.cache=off"), QUIET)


def test_what_the_key_depends_on(
    settings: Callable[..., Any], tiny_pipeline: Tiny, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_pipeline("sd35m"), tmp_path / "model")

    def key(*more: str) -> EncoderKey:
        return build.encoder_key(settings("run", *more, model=model))

    def changed(old: EncoderKey, new: EncoderKey) -> set[str]:
        assert (old.digest == new.digest) == (old.facts == new.facts)
        return {name for name, _ in set(old.facts.items()) ^ set(new.facts.items())}

    first = key()
    assert changed(first, key("train.batch_size=4", "model.guidance=2.0")) == set()
    assert changed(first, key("model.dtype=bf16")) == {"dtype"}
    assert changed(first, key("model.max_sequence_length=9")) == {"max_sequence_length"}
    file = model / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, {"format": "pt"})
    assert changed(first, key()) == {"text_encoder_2/model.safetensors"}
    second = key()
    tokenizer = model / "tokenizer_3" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"padding_side": "left"}))
    assert changed(second, key()) == {"tokenizer_3/tokenizer_config.json"}
    (model / "transformer" / "README.md").write_text("of no importance")
    assert changed(key(), key()) == set()


def test_weights_that_are_missing_or_of_another_shape(tiny_pipeline: Tiny, tmp_path: Path) -> None:
    """The libraries would go on with random numbers."""
    for part, stem in (
        ("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
        ("text_encoder_3", "model"),
    ):  # fmt: skip
        model = shutil.copytree(tiny_pipeline("sd3m"), tmp_path / part)
        file = model / part / f"{stem}.safetensors"
        tensors = load_file(file)
        name = sorted(tensors)[len(tensors) // 2]
        save_file({k: v for k, v in tensors.items() if k != name}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{part} lacks the weight .*{name}"):
            load(model)
        save_file({**tensors, name: torch.zeros(3)}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=part):
            load(model)

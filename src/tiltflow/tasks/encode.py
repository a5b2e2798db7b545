"""`tiltflow encode`: the embeddings of a recipe's prompts, before any training."""

from __future__ import annotations

from rich.console import Console

from tiltflow.config.load import RunConfig, validate_files
from tiltflow.core.paths import embedding_cache
from tiltflow.core.sentences import counted
from tiltflow.setup.build import attention_for, device_of, encode_sets


def encode_recipe(cfg: RunConfig, console: Console) -> None:
    """Encodes what the cache lacks of a recipe's prompts, and says what a run will read from it.

    Raises:
        ValueError: if there is nothing to encode, `data.cache` is off, or a file is not in order.
    """
    if not cfg.model.has_files:
        name = cfg.model.path
        raise ValueError(f"the {name} has no text encoder, so there is nothing to encode")
    root = embedding_cache(cfg.data.cache)
    if root is None:
        raise ValueError("data.cache is off, so there is nowhere to put the embeddings")
    sets = validate_files(cfg)
    with attention_for(cfg, device_of(cfg.run.device)):
        encoded, *_ = encode_sets(
            cfg, [sets.train, sets.fixed], lambda line: console.print(line, markup=False)
        )
    for key, value in encoded.tables[0].positive.items():
        shape = (len(encoded), *value.shape[1:])
        console.print(f"{key}: {shape} {value.dtype}", markup=False, highlight=False)
    size = sum(
        value.numel() * value.element_size()
        for table in encoded.tables
        for value in table.positive.values()
    )
    console.print(f"{counted(len(encoded), 'prompt')}, {size / 1e6:.1f} MB in {root}", markup=False)

"""A base that ranks share: in main memory, and on all ranks but one without values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families_table import CASES

from tiltflow.config.load import load_config
from tiltflow.core.distributed import Ranks
from tiltflow.models.families import load_backbone
from tiltflow.setup.build import build_backbone

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        *(quick := ["sd35m", "flux_dev", "klein_base", "krea2", "qwen_image_21"]),
        *(
            pytest.param(case.names[0], marks=pytest.mark.long)
            for case in CASES.values()
            if case.names[0] not in quick
        ),
    ],
)
def test_a_base_without_values_is_the_same_network(
    name: str, dtype: torch.dtype, tiny_pipeline: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = tiny_pipeline(name), {"device": "cpu", "dtype": dtype, "parts": "image"}
    whole = load_backbone(path, base="host", **options)  # type: ignore[arg-type]
    kind = type(whole.teacher_base)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(kind, "from_pretrained", refuse)
    empty = load_backbone(path, base="empty", **options)  # type: ignore[arg-type]
    assert type(empty.teacher_base) is kind and not empty.teacher_base.training

    def described(network: torch.nn.Module) -> dict[str, tuple]:
        tensors = [*network.named_parameters(), *network.named_buffers()]
        return {n: (t.shape, t.dtype, t.device.type, t.requires_grad) for n, t in tensors}

    assert described(empty.teacher_base) == described(whole.teacher_base)
    # what is no part of a rank's share is read everywhere
    for name, value in whole.vae.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(empty.vae.state_dict()[name], value)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("rank", "base"), [(0, "host"), (1, "empty")])
def test_only_rank_0_reads_the_weights_that_are_shared(
    rank: int, base: str, tiny_pipeline: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def loaded(*args: object, base: object, **options: object) -> object:
        seen.append(base)
        return object()

    monkeypatch.setattr("tiltflow.setup.build.load_backbone", loaded)
    cfg = load_config(
        "demo_cold_start",
        [f"model.path={tiny_pipeline('sd35m')}", "run.sharding=fsdp2", "run.device=cpu"],
    )
    build_backbone(cfg, "image", Ranks(rank, 2))
    build_backbone(cfg, "text")
    assert seen == [base, "device"]

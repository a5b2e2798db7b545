"""Draws are functions of (seed, stream, step), with the distributions they claim."""

import hashlib
import itertools
import math

import pytest
import torch

from tiltflow.core.distributed import Ranks
from tiltflow.core.randomness import BLOCK, Randomness
from tiltflow.training.updates import Share

CPU = torch.device("cpu")


def test_generator_is_seeded_with_63_bits_of_blake2b() -> None:
    digest = hashlib.blake2b(b"7/noise/3", digest_size=8).digest()
    expected = int.from_bytes(digest, "big") >> 1
    assert Randomness(7).generator("noise", 3).initial_seed() == expected < 2**63


def test_a_draw_depends_on_seed_stream_and_step_alone() -> None:
    random = Randomness(1)
    first = random.normal("a", 5, (4, 3))
    random.normal("b", 9, (100,))
    torch.manual_seed(123)
    assert torch.equal(first, Randomness(1).normal("a", 5, (4, 3)))
    for other in (
        Randomness(2).normal("a", 5, (4, 3)),
        random.normal("b", 5, (4, 3)),
        random.normal("a", 6, (4, 3)),
    ):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(6, 5), (3, 40_000), (100, 1000), (200, 512)])
def test_rows_of_a_batch_are_the_same_however_they_are_cut(shape: tuple[int, int]) -> None:
    """One block, a block a row, and blocks of 32 and of 64 rows."""
    random, n = Randomness(3), shape[0]
    whole = random.normal_rows("a", 5, shape, slice(0, n))
    assert whole.shape == shape and abs(float(whole.mean())) < 4 / math.sqrt(whole.numel())
    for cuts in ([0, n], [0, 1, n], [0, n // 3, n // 2, n]):
        parts = [
            random.normal_rows("a", 5, shape, slice(a, b)) for a, b in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(parts), whole)
    each = max(1, BLOCK // shape[1])
    assert torch.equal(whole[:each], random.normal("a", 5, (min(each, n), shape[1])))
    assert len(torch.unique(whole[:, 0])) == n  # no block repeats another


def test_a_rank_makes_the_noise_of_its_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = Randomness.normal

    def counted(self: Randomness, stream: str, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        made.append(shape[0])
        return real(self, stream, step, shape)

    random, latent = Randomness(0), (16, 64, 64)
    whole = torch.cat(
        [Share(8, 8, Ranks(rank, 4)).noise(random, "a", 0, latent, CPU) for rank in range(4)]
    )
    monkeypatch.setattr(Randomness, "normal", counted)
    share = Share(8, 8, Ranks(2, 4))
    assert torch.equal(share.noise(random, "a", 0, latent, CPU), whole[4:6]) and sum(made) == 2
    grouped = [
        Share(9, 9, Ranks(rank, 4)).noise(random, "a", 0, (2,), CPU, group=3) for rank in range(4)
    ]
    plain = random.normal_rows("a", 0, (9, 2), slice(0, 9))
    assert torch.equal(torch.cat(grouped), plain[::3].repeat_interleave(3, 0))


def test_draws_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Randomness(0).normal("a", 0, (8,))
    Randomness(0).permutation("a", 0, 8)
    assert torch.equal(torch.rand(3), expected)


def test_normal_has_mean_0_and_variance_1() -> None:
    draw = Randomness(0).normal("x", 0, (100_000,))
    assert draw.dtype == torch.float32
    assert abs(float(draw.mean())) < 4 / math.sqrt(len(draw))
    assert float(draw.var()) == pytest.approx(1.0, abs=0.02)


def test_uniform_covers_its_range() -> None:
    draw = Randomness(0).uniform("x", 0, (100_000,), low=-2.0, high=3.0)
    assert draw.dtype == torch.float32
    assert -2 <= float(draw.min()) < -1.99 and 2.99 < float(draw.max()) <= 3
    assert float(draw.mean()) == pytest.approx(0.5, abs=0.02)


def test_integers_exclude_high() -> None:
    draw = Randomness(0).integers("x", 0, 1, 5, (10_000,))
    assert draw.dtype == torch.int64
    counts = torch.bincount(draw, minlength=6)
    assert counts[0] == counts[5] == 0
    assert bool((counts[1:5] > 2_300).all())


def test_permutation_holds_every_number_once() -> None:
    order = Randomness(0).permutation("x", 0, 50)
    assert sorted(order.tolist()) == list(range(50)) != order.tolist()


def test_draws_move_to_the_device_asked_for() -> None:
    random = Randomness(0)
    assert random.normal("x", 0, (2,), device="meta").device.type == "meta"
    assert random.uniform("x", 0, (2,), device="meta").device.type == "meta"
    assert random.integers("x", 0, 0, 2, (2,), device="meta").device.type == "meta"


def test_dtype_does_not_follow_the_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert Randomness(0).normal("x", 0, (2,)).dtype == torch.float32
        assert Randomness(0).uniform("x", 0, (2,)).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_bad_arguments_are_refused() -> None:
    random = Randomness(0)
    with pytest.raises(ValueError, match="-1 is negative"):
        random.normal("x", -1, (2,))
    with pytest.raises(ValueError, match="needs a name"):
        random.permutation("", 0, 2)
    with pytest.raises(ValueError, match=r"no integer in \[3, 3\)"):
        random.integers("x", 0, 3, 3, (1,))
    with pytest.raises(ValueError, match="low 2"):
        random.uniform("x", 0, (1,), low=2, high=1)
    with pytest.raises(ValueError, match="0 or more"):
        Randomness(-1)

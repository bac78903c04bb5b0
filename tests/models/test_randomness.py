from __future__ import annotations

import pytest
import torch

from models.randomness import SEED_LIMIT, derive_seed, fresh_seeds, generator_for, normal, permutations, uniform

CPU = torch.device("cpu")


def test_a_derived_seed_depends_on_every_part_of_its_path() -> None:
    seeds = {derive_seed(0), derive_seed(1), derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(0, "a", 1)}

    assert len(seeds) == 5
    assert all(0 <= seed < SEED_LIMIT for seed in seeds)
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)


@pytest.mark.parametrize("seed", [-1, SEED_LIMIT])
def test_a_seed_outside_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="whole number"):
        derive_seed(seed)


def test_the_largest_seed_makes_a_generator() -> None:
    generator = generator_for(SEED_LIMIT - 1)

    assert torch.rand((), generator=generator) != torch.rand((), generator=generator)


@pytest.mark.parametrize("draw", [normal, uniform])
def test_a_row_depends_on_its_own_seed_alone(draw) -> None:  # type: ignore[no-untyped-def]
    alone = draw([7], (3, 4), CPU)
    among_others = draw([1, 7, 2], (3, 4), CPU)

    assert torch.equal(among_others[1], alone[0])
    assert not torch.equal(among_others[0], among_others[1])


def test_normal_draws_have_mean_zero_and_deviation_one() -> None:
    draws = normal(range(50), (20, 20), CPU)

    assert abs(float(draws.mean())) < 0.03
    assert abs(float(draws.std()) - 1) < 0.03


def test_permutations_hold_every_number_once() -> None:
    rows = permutations([3, 4], 64, CPU)

    assert rows.sort(dim=1).values.tolist() == [list(range(64))] * 2
    assert rows[0].tolist() != rows[1].tolist()


def test_fresh_seeds_differ_and_follow_the_global_generator() -> None:
    torch.manual_seed(5)
    first = fresh_seeds(4)
    torch.manual_seed(5)

    assert fresh_seeds(4) == first
    assert len(set(first)) == 4

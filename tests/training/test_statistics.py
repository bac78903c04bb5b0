from __future__ import annotations

import math

import pytest
import torch

from training.statistics import auroc, binomial, detection, paired


@pytest.mark.parametrize(("right", "n"), [(73, 100), (0, 10), (10, 10), (359, 512)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    z, share = 1.959963985, right / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5

    found = binomial(right, n)

    assert found == {"accuracy": round(share, 4), "interval": found["interval"], "n": n}
    assert found["interval"] == pytest.approx([max(0, center - half), min(1, center + half)], abs=6e-5)


@pytest.mark.parametrize(
    ("natural", "adversarial", "expected"),
    [([0.9, 0.8, 0.4], [0.7, 0.3], 5 / 6), ([0.9, 0.8], [0.1], 1.0), ([0.1], [0.2, 0.3], 0.0), ([0.5], [0.5], 0.5)],
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(
    natural: list[float], adversarial: list[float], expected: float
) -> None:
    assert auroc(torch.tensor(natural), torch.tensor(adversarial)) == pytest.approx(expected)


def test_detection_counts_what_scores_below_the_threshold() -> None:
    clean, attacked = torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([0.1, 0.75])
    found = detection({"clean": clean, "pgd": attacked}, 0.5)
    assert found["threshold"] == 0.5
    assert (found["false_positive_rate"]["accuracy"], found["false_positive_rate"]["n"]) == (0.25, 4)
    assert found["attacks"].keys() == {"pgd"}
    assert found["attacks"]["pgd"]["auroc"] == 6 / 8
    assert found["attacks"]["pgd"]["detected"]["accuracy"] == 0.5


def test_a_sign_test_compares_a_defense_with_its_static_model() -> None:
    defended, static = torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    defended[:50], static[40:60] = True, True
    found = paired(defended, static)
    assert found == {"difference": 0.3, "better": 40, "worse": 10, "n": 100, "p_value": found["p_value"]}
    assert found["p_value"] == pytest.approx(2 * sum(math.comb(50, k) for k in range(11)) / 2**50, abs=1e-6)
    assert paired(static, static)["p_value"] == 1.0

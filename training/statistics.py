"""Numbers that say how sure they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scipy.stats import binomtest, mannwhitneyu
from torch import Tensor


def binomial(right: float, n: int) -> dict[str, Any]:
    """`right` of `n` as accuracy and Wilson's 95 % interval, in [0, 1]."""
    interval = binomtest(round(right), n).proportion_ci(0.95, method="wilson")
    return {"accuracy": round(right / n, 4), "interval": [round(interval.low, 4), round(interval.high, 4)], "n": n}


def paired(one: Tensor, other: Tensor) -> dict[str, Any]:
    """Which of two got more of the same images right (N,): a sign test on those that differ, over the first of both."""
    count = min(len(one), len(other))
    one, other = one[:count], other[:count]
    better, worse = int((one & ~other).sum()), int((other & ~one).sum())
    p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return {
        "difference": round((better - worse) / count, 4),
        "better": better,
        "worse": worse,
        "n": count,
        "p_value": round(p_value, 6),
    }


def detection(scores: Mapping[str, Tensor], threshold: float) -> dict[str, Any]:
    """How well the scores tell clean images from attacked ones: AUROC, and rates at the bundle's threshold."""
    clean = scores["clean"]
    return {
        "threshold": threshold,
        "false_positive_rate": binomial(float((clean < threshold).sum()), len(clean)),
        "attacks": {
            name: {
                "auroc": round(auroc(clean, found), 4),
                "detected": binomial(float((found < threshold).sum()), len(found)),
            }
            for name, found in scores.items()
            if name != "clean"
        },
    }


def auroc(natural: Tensor, adversarial: Tensor) -> float:
    """The probability that a natural image scores above an adversarial one (Mann-Whitney U over both counts)."""
    # In float32 the sum of ranks would lose its last digits, and would be no number that JSON knows.
    statistic = float(mannwhitneyu(natural.double().numpy(), adversarial.double().numpy()).statistic)
    return statistic / (len(natural) * len(adversarial))

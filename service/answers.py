"""What an engine says about an image becomes what its client reads."""

from __future__ import annotations

import numpy as np

from models.manifest import Manifest
from service.schemas import ClassifyResponse, Timing, Verdict
from service.work import Classified, Floats, Key

DEFAULT_TOP_K = 5
SCORE_DIGITS = 3
"""Of AID's score: enough to watch it, too few for an attacker who climbs on its smallest changes."""


def classify_response(
    classified: Classified,
    manifest: Manifest,
    *,
    key: Key,
    digest: str,
    request_id: str,
    top_k: int | None,
    seed: int,
    timing_ms: Timing,
) -> ClassifyResponse:
    """The answer of /classify."""
    classes, threshold, score = manifest.classes, manifest.aid_threshold, classified.aid_score
    verdicts = top(classified.probabilities, classes, top_k or DEFAULT_TOP_K)
    first, undefended = verdicts[0], classified.undefended
    return ClassifyResponse(
        request_id=request_id,
        model=key.model,
        digest=digest,
        defense=key.defense,
        ran=classified.ran or key.defense,
        degraded=classified.degraded,
        seed=seed,
        label=first["label"],
        index=first["index"],
        probability=first["probability"],
        top=verdicts,
        undefended=None if undefended is None else top(undefended, classes, 1)[0],
        aid_score=None if score is None else round(score, SCORE_DIGITS),
        suspicious=None if score is None or threshold is None else score < threshold,
        timing_ms=timing_ms,
    )


def top(probabilities: Floats, classes: tuple[str, ...], count: int) -> list[Verdict]:
    """The `count` likeliest classes; of equals the first."""
    order = np.argsort(-probabilities, kind="stable")[:count].tolist()
    return [Verdict(label=classes[i], index=i, probability=float(probabilities[i])) for i in order]

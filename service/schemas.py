"""What goes over the wire, in and out, apart from images and query parameters.

Answers of the routes that run an engine are typed dictionaries: what we made ourselves needs no validation, which would
take most of the time of making an answer.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12


class Wire(BaseModel):
    """Frozen, so that what was validated is what is sent."""

    model_config = ConfigDict(frozen=True)


class ParameterProblem(Wire):
    """What is wrong, and where: `#/query/top_k`, `#/header/X-Request-Timeout-Ms`, `#/form/file`."""

    pointer: str
    detail: str


class Problem(Wire):
    """An error, RFC 9457; absent members are left out."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    limit: int | None = None
    actual: int | None = None
    errors: list[ParameterProblem] | None = None


class Verdict(TypedDict):
    """A class and its probability."""

    label: str
    index: int
    probability: float


class Timing(TypedDict):
    """Milliseconds of each stage; `queue` is the wait, `inference` the batch's own run."""

    decode: float
    queue: float
    inference: float
    total: float


class ClassifyResponse(TypedDict):
    """The answer of POST /classify."""

    request_id: str
    model: str
    digest: str
    """sha256 of the bundle's `bundle.json`: which bundle gave this answer."""
    defense: str
    ran: str
    """The chain that ran: `defense` itself, or what `auto` chose for this image."""
    degraded: bool
    """Whether that is the cheap chain of `auto` because its strong one was asked for too often."""
    seed: int
    """The seed that was used: with it the same image gives the same answer again."""
    label: str
    index: int
    probability: float
    top: list[Verdict]
    undefended: Verdict | None
    aid_score: float | None
    """The probability that the image is natural (1), not adversarial (0)."""
    suspicious: bool | None
    timing_ms: Timing


class DetectResponse(TypedDict):
    """The answer of POST /detect."""

    request_id: str
    model: str
    digest: str
    aid_score: float
    suspicious: bool
    threshold: float
    timing_ms: Timing


class BatchResponse(TypedDict):
    """The answer of POST /classify/batch: one entry per image, in the order they were sent."""

    request_id: str
    results: list[ClassifyResponse | Problem]


class PurifiedImage(TypedDict):
    """An image of POST /purify/batch that was purified, and in which file of the zip it is."""

    status: int
    """200, as a problem has its own."""
    file: str
    linf: float
    seed: int
    degraded: bool
    """As of /classify."""


class PurifyBatchResponse(TypedDict):
    """`results.json` in the zip of POST /purify/batch: one entry per image, in the order they were sent."""

    request_id: str
    model: str
    digest: str
    defense: str
    results: list[PurifiedImage | Problem]


class DefenseInfo(Wire):
    """A defense that a bundle offers."""

    default_preset: str
    presets: dict[str, dict[str, object]]


class ModelInfo(Wire):
    """One loaded bundle."""

    name: str
    version: str
    digest: str
    classes: list[str]
    input_size: tuple[int, int]
    """Height and width in pixels."""
    default_defense: str
    defenses: dict[str, DefenseInfo]
    aid_threshold: float | None
    report: dict[str, object]


class Refusal(Wire):
    """A bundle that was not loaded."""

    bundle: str
    reason: str


class ModelsResponse(Wire):
    """The answer of GET /models."""

    default_model: str
    models: list[ModelInfo]
    refused: list[Refusal]


class JobResponse(Wire):
    """A job and how far it is."""

    id: str
    state: Literal["waiting", "running", "done"]
    operation: Literal["classify", "purify"]
    model: str
    digest: str
    defense: str
    images: int
    done: int
    """Images that have their answer, the failed ones among them."""
    failed: int
    created: str
    expires: str
    """When it is forgotten, done or not."""


class HealthResponse(Wire):
    """The answer of a probe."""

    status: str
    reason: str | None = None

"""Query parameters: strict (unknown, repeated or out of range is 422), and documented in OpenAPI."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import QueryParams

from service.errors import DeadlineExceeded, InvalidParameter
from service.request_headers import headers_of
from service.schemas import ParameterProblem

MAX_VOTES = 64
REMEMBERED_QUERIES = 1024
"""Most clients ask the same question of every image. What is not valid is not remembered."""
REMEMBERED_BYTES = 256
"""Of a query; longer ones, which would fill the memory, are read each time."""

Model = Annotated[
    str | None,
    Field(max_length=128, description="Bundle, `name` (its newest version) or `name@version`."),
]
Defense = Annotated[
    str | None,
    Field(
        max_length=1024,
        description="`none`, or a comma-separated chain of the bundle's defenses, applied left to right; a "
        "preset follows a colon: `atop:rt3,aid`. Unset: the bundle's default. `zeropur` turns away from any confident "
        "answer, right or wrong: it is for images that you already suspect, and ruins clean ones.",
    ),
]
Seed = Annotated[
    int | None,
    Field(ge=0, lt=2**64, description="Makes the defense's randomness reproducible, alone or in any batch."),
]
Votes = Annotated[
    int,
    Field(
        ge=1,
        le=MAX_VOTES,
        description="Random draws whose probabilities are averaged; at most 8 for a random chain with `aid`, `zeropur` "
        "or `auto`, which are slow. A defense that draws nothing runs once.",
    ),
]
TopK = Annotated[int | None, Field(ge=1, description="How many classes to list, at most all; 5 if unset.")]
Explain = Annotated[
    bool,
    Field(description="Adds `undefended`, `aid_score` and `suspicious`, at the cost of extra passes."),
]

NO_EFFECT = "As for `/classify`, and without effect: "
IgnoredVotes = Annotated[int, Field(ge=1, le=MAX_VOTES, description=NO_EFFECT + "an image is purified by one draw.")]
IgnoredTopK = Annotated[int | None, Field(ge=1, description=NO_EFFECT + "nothing is classified.")]
IgnoredExplain = Annotated[bool, Field(description=NO_EFFECT + "the answer is an image.")]
Size = Annotated[
    Literal["model", "original"],
    Field(description="The model's input size, or the upload's own (finer detail is not purified)."),
]

JobOperation = Annotated[
    Literal["classify", "purify"], Field(description="What is done with each image: as by the route of that name.")
]
JobSize = Annotated[
    Literal["model"],
    Field(description="A job purifies at the model's input size; originals are not kept: see `/purify/batch`."),
]


class Parameters(BaseModel):
    """Frozen; a parameter that is not a field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelParameters(Parameters):
    """Of every route that asks a model."""

    model: Model = None


class DetectParameters(ModelParameters):
    """Of /detect, which runs no defense."""


class DefenseParameters(ModelParameters):
    """Of every route that runs a defense."""

    defense: Defense = None
    seed: Seed = None


class ClassifyParameters(DefenseParameters):
    """Of /classify and /classify/batch."""

    votes: Votes = 1
    top_k: TopK = None
    explain: Explain = False


class PurifyParameters(DefenseParameters):
    """Of /purify and /purify/batch. A client may send one query to every route that runs a defense."""

    size: Size = "model"
    votes: IgnoredVotes = 1
    top_k: IgnoredTopK = None
    explain: IgnoredExplain = False


class JobParameters(ClassifyParameters):
    """Of /jobs. For another operation than `classify`, what only that one has is without effect."""

    operation: JobOperation = "classify"
    size: JobSize = "model"

    def asked(self) -> ClassifyParameters | PurifyParameters:
        """The same as the route that answers such images at once has them."""
        kind = ClassifyParameters if self.operation == "classify" else PurifyParameters
        return kind(**self.model_dump(exclude={"operation", "size"}))


class InferParameters(Parameters):
    """Of an inference, in its JSON body: what has the name of a query parameter means the same."""

    model_config = ConfigDict(strict=True)

    defense: Defense = None
    seed: Seed = None
    votes: Votes = 1
    timeout: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Microseconds until the deadline; 0 leaves it to X-Request-Timeout-Ms."""
    priority: Annotated[int, Field(ge=0, le=1)] = 0
    """There is one level: the default, 0, which is also the highest, 1."""
    binary_data_output: bool = False
    """Whether outputs that say nothing else about themselves are sent as binary tensors."""


class NoParameters(Parameters):
    """Of routes that take none."""


P = TypeVar("P", bound=Parameters)


def read_parameters(kind: type[P], request: Request) -> P:
    """The query of `request`. Raises InvalidParameter, with a pointer to each thing that is wrong."""
    query = request.scope["query_string"]
    return _remembered(kind, query) if len(query) <= REMEMBERED_BYTES else _parameters(kind, query)


def _parameters(kind: type[P], query: bytes) -> P:
    items = QueryParams(query).multi_items()
    values = dict(items)
    if len(values) < len(items):
        names = [name for name, _ in items]
        repeated = sorted({name for name in names if names.count(name) > 1 and name in kind.model_fields})
        raise invalid(*(("query", name, "is given more than once") for name in repeated or ["unknown"]))
    return validated(kind, values, "query")


_remembered = lru_cache(REMEMBERED_QUERIES)(_parameters)


def validated(kind: type[P], values: Mapping[str, object], place: str) -> P:
    """`values`, which came in `place`. Raises InvalidParameter, with a pointer to each thing that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise invalid(*((place, *_name_and_detail(kind, problem)) for problem in found[:16])) from None


def _name_and_detail(kind: type[Parameters], problem: Any) -> tuple[str, str]:
    name = str(problem["loc"][0])
    if name not in kind.model_fields:
        known = ", ".join(kind.model_fields) or "none"
        return printable(name), f"is not a parameter of this route; known: {known}"
    return name, problem["msg"]


def printable(name: str) -> str:
    """A client's name for something, safe to show."""
    return re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64])


def invalid(*problems: tuple[str, str, str]) -> InvalidParameter:
    """The error for (place, name, detail) of each thing that is wrong; place is `query`, `header` or `parameters`."""
    errors = [ParameterProblem(pointer=f"#/{place}/{name}", detail=detail) for place, name, detail in problems]
    return InvalidParameter("; ".join(f"{name}: {detail}" for _, name, detail in problems), errors=errors)


def read_timeout_s(request: Request, longest_s: float) -> float:
    """Seconds until this request's deadline: X-Request-Timeout-Ms, capped by `longest_s`.

    Raises InvalidParameter if it is not a whole number of milliseconds, DeadlineExceeded if it is 0: past.
    """
    text = headers_of(request.scope).get("x-request-timeout-ms")
    if text is None:
        return longest_s
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise invalid(("header", "X-Request-Timeout-Ms", "is not a whole number of milliseconds"))
    if int(text) == 0:
        raise DeadlineExceeded("the deadline had passed when the request came")
    return min(int(text) / 1000, longest_s)


def read_accepted(request: Request, offered: tuple[str, ...]) -> str | None:
    """The type of `offered` that the Accept header prefers, the first of equals; None if it accepts none."""
    accept = headers_of(request.scope).get("accept", "*/*") or "*/*"
    best, best_quality = None, 0.0
    for media_type in offered:
        quality = _quality(media_type, accept)
        if quality > best_quality:
            best, best_quality = media_type, quality
    return best


def _quality(media_type: str, accept: str) -> float:
    """The q of the most specific range in `accept` that covers `media_type`, else 0 (RFC 9110, 12.5.1)."""
    found = (-1, 0.0)
    for entry in accept.lower().split(","):
        kind, *options = (part.strip() for part in entry.split(";"))
        ranges = ["*/*", media_type.split("/")[0] + "/*", media_type]
        if kind in ranges:
            found = max(found, (ranges.index(kind), _q(options)))
    return found[1]


def _q(options: list[str]) -> float:
    for option in options:
        if option.startswith("q="):
            try:
                quality = float(option[2:])
            except ValueError:
                return 0.0
            return quality if math.isfinite(quality) else 0.0
    return 1.0

"""One image's way through the service, step by step: `ask`, `read_upload`, `decode`, and `answering.answer`.

The routes call these in this order. Everything that can be refused without the body is refused by `ask`, and whoever
is inside its block is answered, even if a drain begins. Everything that depends on a client's bytes happens before the
queue, except that `/purify?size=original` decodes the upload again for its answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Generic, ParamSpec, TypeVar

from fastapi import Request

from models.manifest import Manifest, UnknownDefense
from service.access import key_of, require
from service.dispatch import Dispatcher, Places
from service.errors import ClarifierError, DeadlineExceeded
from service.gateway import Gateway, Visit, gateway_of
from service.images import Decoded, decode_if_quick, decode_image
from service.keys import Right
from service.parameters import (
    ClassifyParameters,
    DefenseParameters,
    ModelParameters,
    PurifyParameters,
    invalid,
    read_parameters,
    read_timeout_s,
)
from service.record import Record, record_of
from service.repository import Catalog, DescribedBundle
from service.uploads import Account, read_image, read_images
from service.work import Key, Operation

FRESH_SEED_BITS = 53
"""Of seeds that we draw, so that JSON clients that count in doubles can send them back."""
SLOW_DEFENSES = frozenset({"aid", "zeropur", "auto"})
QUICK_HASH_BYTES = 64 * 1024
"""That are hashed at once: the way to a thread and back would take longer."""
MAX_SLOW_VOTES = 8
"""Of chains with a slow defense: 64 draws would keep the engine from everybody else for minutes."""

P = TypeVar("P", bound=ModelParameters, covariant=True)
Given = TypeVar("Given", bound=ModelParameters)
R = TypeVar("R")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True, slots=True)
class Question(Generic[P]):
    """A request whose query and headers are sound; its body has not been read. It is let in until its `with` ends."""

    gateway: Gateway
    visit: Visit
    places: Places
    account: Account
    record: Record
    parameters: P
    catalog: Catalog
    """Of when it was let in: what a reload puts in its place is for others."""
    bundle: DescribedBundle
    key: Key
    deadline: float
    """A reading of the monotonic clock."""

    @property
    def batcher(self) -> Dispatcher:
        """The queue that it was let into."""
        return self.visit.batcher

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that will answer."""
        return self.bundle.manifest

    @property
    def keeps_upload(self) -> bool:
        """Whether the upload is needed until the answer is there: again for it, or because floats wait as they came."""
        return self.key.floats or (isinstance(self.parameters, PurifyParameters) and self.parameters.size == "original")

    @property
    def draws(self) -> bool:
        """Whether the answer depends on a seed."""
        parameters, chain = self.parameters, self.catalog.chain
        return isinstance(parameters, DefenseParameters) and chain(self.key.model, parameters.defense).is_random

    @property
    def seeded(self) -> bool:
        """Whether the client has sent a seed."""
        return isinstance(self.parameters, DefenseParameters) and self.parameters.seed is not None

    @property
    def scope(self) -> str:
        """Who shares cached answers with this client: whoever has its key, or everybody where there are none."""
        return self.record.key

    def __enter__(self) -> Question[P]:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.account.release()
        self.places.free()
        self.visit.end(error)


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image that is ready for the queue, and how long it took to decode, a wait for a thread included."""

    image: Decoded
    decode_ms: float


def ask(request: Request, operation: Operation, kind: type[P]) -> Question[P]:
    """What `request` asks, for a `with` block. Raises what its query, headers, model, key and the queue forbid."""
    question = ask_with(request, operation, read_parameters(kind, request))
    try:
        question.batcher.check_in_time(question.key, question.deadline)
    except BaseException:
        question.visit.end()
        raise
    return question


def ask_with(request: Request, operation: Operation, parameters: Given) -> Question[Given]:
    """As `ask`, for `parameters` that were not read from the query, and however long the queue is: a job has time, and
    what a body may still `refine` is not known yet.
    """
    gateway = gateway_of(request)
    record = record_of(request.scope)
    deadline = record.started + read_timeout_s(request, gateway.settings.request_timeout_ms / 1000)
    visit = gateway.let_in()
    batcher, catalog = visit.batcher, gateway.catalog
    try:
        asked = (operation, _without_seed(parameters), gateway.settings.default_model)
        key, bundle = catalog.memoized(_find, asked)
        record.model, record.digest = key.model, bundle.digest
        record.defense = key.defense if isinstance(parameters, DefenseParameters) else ""
        check_rights(request, key, catalog)
    except BaseException:
        visit.end()
        raise
    places, account = batcher.places(), gateway.uploads.account()
    return Question(gateway, visit, places, account, record, parameters, catalog, bundle, key, deadline)


def _without_seed(parameters: Given) -> Given:
    """What many clients ask alike: many send a seed of their own."""
    if not isinstance(parameters, DefenseParameters) or parameters.seed is None:
        return parameters
    return parameters.model_copy(update={"seed": None})


def _find(catalog: Catalog, asked: tuple[Operation, ModelParameters, str]) -> tuple[Key, DescribedBundle]:
    operation, parameters, default_model = asked
    name, bundle = catalog.find(default_model if parameters.model is None else parameters.model)
    return key_for(operation, name, catalog, parameters), bundle


def refine(
    asked: Question[ModelParameters], parameters: Given, deadline: float, *, floats: bool, purified: bool = False
) -> Question[Given]:
    """The whole question, where the body said more of it than the query. Raises InvalidParameter and Overloaded."""
    key = key_for(asked.key.operation, asked.key.model, asked.catalog, parameters)
    key = replace(key, purified=purified, floats=floats)
    asked.batcher.check_in_time(key, deadline)
    asked.record.defense = key.defense
    return Question(
        asked.gateway,
        asked.visit,
        asked.places,
        asked.account,
        asked.record,
        parameters,
        asked.catalog,
        asked.bundle,
        key,
        deadline,
    )


def key_for(operation: Operation, name: str, catalog: Catalog, parameters: ModelParameters) -> Key:
    """What images of such a request must agree on. Raises InvalidParameter if the bundle cannot do it."""
    bundle = catalog.bundles[name]
    if not isinstance(parameters, DefenseParameters):
        return Key(operation, name, digest=bundle.digest)
    try:
        chain = catalog.chain(name, parameters.defense)
    except UnknownDefense as error:
        raise invalid(("query", "defense", str(error))) from None
    if not isinstance(parameters, ClassifyParameters):
        return Key(operation, name, chain.defense, digest=bundle.digest)
    classes = bundle.manifest.classes
    if parameters.top_k is not None and parameters.top_k > len(classes):
        raise invalid(("query", "top_k", f"the model has {len(classes)} classes"))
    votes = parameters.votes if chain.is_random else 1
    if votes > MAX_SLOW_VOTES and not SLOW_DEFENSES.isdisjoint(chain.steps):
        slow = " or ".join(sorted(SLOW_DEFENSES))
        raise invalid(("query", "votes", f"is at most {MAX_SLOW_VOTES} for a random chain with {slow}"))
    return Key(operation, name, chain.defense, votes, parameters.explain, digest=bundle.digest)


def check_rights(request: Request, key: Key, catalog: Catalog) -> None:
    """Raises Forbidden if the API key of `request` may not ask for `key`."""
    if key_of(request.scope) is None:
        return
    if key.explain:
        require(request.scope, Right.EXPLAIN)
    if not SLOW_DEFENSES.isdisjoint(catalog.chain(key.model, key.defense).steps):
        require(request.scope, Right.COSTLY)


def draw_seed(question: Question[DefenseParameters]) -> int:
    """The client's seed, or a fresh one."""
    wanted = question.parameters.seed
    return question.gateway.entropy.bits(FRESH_SEED_BITS) if wanted is None else wanted


async def read_upload(question: Question[ModelParameters], request: Request) -> bytes:
    """The bytes of the one image, which has a place in the queue from now on."""
    gateway = question.gateway
    settings = gateway.settings
    limits = (settings.max_image_bytes, settings.body_timeout_s, question.deadline)
    data, declared = await read_image(request, question.account, gateway.decoders, *limits)
    question.record.bytes, question.record.declared = len(data), declared
    question.batcher.reserve(question.places, 1)
    return data


async def read_uploads(question: Question[ModelParameters], request: Request) -> list[bytes | ClarifierError]:
    """Each image of a client's batch, which has a place in the queue from now on, or why it is refused."""
    gateway = question.gateway
    settings = gateway.settings
    limits = (settings.max_batch_size, settings.max_image_bytes, settings.body_timeout_s, question.deadline)
    images = await read_images(request, question.account, gateway.decoders, *limits)
    if gateway.access is not None:
        await gateway.access.count_images(request.scope, len(images))
    sound = [image for image in images if isinstance(image, bytes)]
    question.record.bytes = sum(map(len, sound))
    question.batcher.reserve(question.places, len(sound))
    return images


async def decode(question: Question[ModelParameters], data: bytes, *, alone: bool = True) -> Prepared:
    """The upload at the model's input size: a small one at once, if it is this request's only one, others in a thread.

    `alone` is False for one of many, which together would keep the event loop from everybody else.
    """
    started = time.monotonic()
    size, limit = question.manifest.input_size, question.gateway.settings.max_image_pixels
    record = question.record
    if alone:
        is_quick = len(data) <= QUICK_HASH_BYTES
        record.sha256 = _short_hash(data) if is_quick else await in_thread(question, _short_hash, data)
    decoded = decode_if_quick(data, size, limit) if alone else None
    if decoded is None:
        decoded = await in_thread(question, decode_image, data, size, limit, question.gateway.memory)
    decode_ms = 1000 * (time.monotonic() - started)
    record.time("decode", decode_ms)
    record.format, record.width, record.height = decoded.format, decoded.width, decoded.height
    return Prepared(decoded, decode_ms)


def _short_hash(data: bytes) -> str:
    return sha256(data).hexdigest()[:16]


async def decode_all(
    question: Question[ModelParameters], uploads: Sequence[bytes | ClarifierError]
) -> list[Prepared | ClarifierError]:
    """Each upload as `decode` makes it, or why it cannot be."""
    return await asyncio.gather(*(_decode_or_error(question, upload) for upload in uploads))


async def _decode_or_error(
    question: Question[ModelParameters], data: bytes | ClarifierError
) -> Prepared | ClarifierError:
    if isinstance(data, ClarifierError):
        return data
    try:
        return await decode(question, data, alone=False)
    except ClarifierError as error:  # its frames would keep the upload until the whole batch is answered
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)


async def in_thread(
    question: Question[ModelParameters],
    function: Callable[Arguments, R],
    *arguments: Arguments.args,
    **named: Arguments.kwargs,
) -> R:
    """`function` in a decoder thread; DeadlineExceeded if it is too late when its turn comes."""

    def in_time() -> R:
        if time.monotonic() >= question.deadline:
            raise DeadlineExceeded
        return function(*arguments, **named)

    return await asyncio.get_running_loop().run_in_executor(question.gateway.decoders, in_time)

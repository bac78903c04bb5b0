"""What gateways and workers write to each other through Redis: named fields of bytes, checked when they are read.

A head in JSON holds what is small, arrays are fields of their own, in C order and little-endian. Nothing in an entry is
ever run, and one that is not exactly as expected is `Malformed`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.manifest import Manifest, UnknownDefense
from service.errors import ClarifierError, DeadlineExceeded, InferenceFailed, NotFinite
from service.queue import Completed, Item, Outcome
from service.work import Answer, Classified, Detected, Floats, Key, Operation, Pixels, Purified

Fields = Mapping[bytes, bytes]
"""Of one entry, as Redis gives them."""

HEAD = b"head"
ROUNDING = 1e-3
"""How far from [0, 1] sums of fractions may lie."""
TYPES: dict[str, np.dtype[Any]] = {"u1": np.dtype("u1"), "f4": np.dtype("<f4")}
ERRORS: dict[str, type[ClarifierError]] = {
    error.code: error for error in (InferenceFailed, NotFinite, DeadlineExceeded)
}
"""What a worker may answer in the place of an image."""


class Malformed(ValueError):
    """An entry that no gateway or worker of this version has written."""


@dataclass(frozen=True, slots=True)
class Work:
    """One image on its way to an engine."""

    uid: str
    """Of the image, by its gateway."""
    gateway: str
    key: Key
    image: Pixels
    seed: int
    left_ms: float
    """Until its deadline, when it was sent."""
    traceparent: str = ""
    """Of the request that asks; empty where nobody traces."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one image."""

    uid: str
    outcome: Outcome


def pack_work(uid: str, gateway: str, item: Item, left_ms: float) -> dict[bytes, bytes]:
    """The fields of an image that waits. `unpack_work` reads them."""
    key = item.key
    head = {
        "uid": uid,
        "gateway": gateway,
        "operation": key.operation.value,
        "model": key.model,
        "defense": key.defense,
        "votes": key.votes,
        "explain": key.explain,
        "purified": key.purified,
        "floats": key.floats,
        "seed": item.seed,
        "left_ms": left_ms,
        "traceparent": item.traceparent,
    }
    return _pack(head, image=item.image)


def unpack_work(fields: Fields) -> Work:
    """Raises Malformed."""
    head, arrays = _unpack(fields)
    try:
        key = Key(
            Operation(head["operation"]),
            _text(head["model"]),
            _text(head["defense"]),
            _whole(head["votes"], least=1),
            *(_truth(head[name]) for name in ("explain", "purified", "floats")),
        )
        if (arrays["image"].dtype == TYPES["f4"]) != key.floats:
            raise ValueError("the image is of another kind than its key says")
        uid, gateway = _text(head["uid"]), _text(head["gateway"])
        seed, left_ms, trace = _whole(head["seed"]), _finite(head["left_ms"]), _text(head.get("traceparent", ""))
        return Work(uid, gateway, key, arrays["image"], seed, left_ms, trace)
    except (KeyError, TypeError, ValueError) as error:
        raise Malformed(str(error)) from None


def pack_reply(uid: str, outcome: Outcome) -> dict[bytes, bytes]:
    """The fields of an outcome. `unpack_reply` reads them; an error that workers do not answer is InferenceFailed."""
    if isinstance(outcome, ClarifierError):
        code = outcome.code if outcome.code in ERRORS else InferenceFailed.code
        return _pack({"uid": uid, "error": code})
    head: dict[str, object] = {
        "uid": uid,
        "queue_ms": outcome.queue_ms,
        "inference_ms": outcome.inference_ms,
        "batch_size": outcome.batch_size,
        "stage_ms": dict(outcome.stage_ms),
    }
    match outcome.answer:
        case Classified() as answer:
            head |= {"kind": "classified", "aid_score": answer.aid_score}
            head |= {"ran": answer.ran, "degraded": answer.degraded, "linf": answer.linf}
            return _pack(
                head, probabilities=answer.probabilities, undefended=answer.undefended, purified=answer.purified
            )
        case Purified() as answer:
            head |= {"kind": "purified", "linf": answer.linf, "degraded": answer.degraded}
            return _pack(head, image=answer.image)
        case Detected() as answer:
            return _pack({**head, "kind": "detected", "aid_score": answer.aid_score})


def unpack_reply(fields: Fields) -> Reply:
    """Raises Malformed."""
    head, arrays = _unpack(fields)
    try:
        uid = _text(head["uid"])
        if "error" in head:
            return Reply(uid, ERRORS[head["error"]]())
        stage_ms = {_text(stage): _finite(spent) for stage, spent in head["stage_ms"].items()}
        times = _finite(head["queue_ms"]), _finite(head["inference_ms"])
        return Reply(uid, Completed(_answer(head, arrays), *times, _whole(head["batch_size"]), stage_ms))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Malformed(str(error)) from None


def pack_answer(name: str, answer: Answer) -> bytes:
    """An answer in one piece, under the name of its question. `unpack_answer` reads it."""
    fields = pack_reply(name, Completed(answer, 0.0, 0.0, 0, {}))
    lengths = [[field.decode(), len(value)] for field, value in fields.items()]
    return b"\n".join([json.dumps(lengths).encode(), b"".join(fields.values())])


def unpack_answer(name: str, packed: bytes) -> Answer:
    """Raises Malformed, also if it is an answer to something else."""
    table, _, data = packed.partition(b"\n")
    fields, start = dict[bytes, bytes](), 0
    try:
        for field, length in json.loads(table):
            fields[field.encode()] = data[start : start + _whole(length)]
            start += length
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise Malformed(str(error)) from None
    if start != len(data):
        raise Malformed("an answer has another size than its table says")
    reply = unpack_reply(fields)
    if reply.uid != name or not isinstance(reply.outcome, Completed):
        raise Malformed("it answers something else")
    return reply.outcome.answer


def fits(answer: Answer, key: Key, manifest: Manifest) -> bool:
    """Whether `answer` can be one to `key`, of the bundle with `manifest`: its kind, its shapes and its numbers."""
    picture = (*manifest.input_size, 3)
    match answer:
        case Classified():
            return (
                key.operation is Operation.CLASSIFY
                and _are_fractions(answer.probabilities, (len(manifest.classes),))
                and (answer.undefended is not None) == key.explain
                and (answer.undefended is None or _are_fractions(answer.undefended, (len(manifest.classes),)))
                and (answer.purified is not None) == key.purified
                and (answer.purified is None or _are_fractions(answer.purified, picture))
                and (answer.aid_score is None or 0 <= answer.aid_score <= 1)
                and (answer.ran is None or _is_defense(answer.ran, manifest))
                and (not answer.degraded or _is_cheap(answer.ran, key, manifest))
                and (answer.linf is None or 0 <= answer.linf <= 1 + ROUNDING)
            )
        case Purified(image, linf, degraded):
            return (
                key.operation is Operation.PURIFY
                and _are_fractions(image, picture)
                and 0 <= linf <= 1 + ROUNDING
                and (not degraded or manifest.gate(key.defense) is not None)
            )
        case Detected(score):
            return key.operation is Operation.DETECT and 0 <= score <= 1


def _are_fractions(array: Floats, shape: tuple[int, ...]) -> bool:
    """Whether all are in [0, 1]; a NaN is not."""
    within = array.shape == shape and array.dtype == np.float32 and (array >= -ROUNDING) & (array <= 1 + ROUNDING)
    return bool(np.all(within))


def _is_defense(chain: str, manifest: Manifest) -> bool:
    try:
        manifest.resolve(chain)
    except UnknownDefense:
        return False
    return True


def _is_cheap(chain: str | None, key: Key, manifest: Manifest) -> bool:
    gate = manifest.gate(key.defense)
    return gate is not None and chain == gate.cheap


def _answer(head: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Answer:
    match head["kind"]:
        case "classified":
            score, ran, linf = head["aid_score"], head["ran"], head.get("linf")
            return Classified(
                arrays["probabilities"],
                arrays.get("undefended"),
                None if score is None else _finite(score),
                None if ran is None else _text(ran),
                arrays.get("purified"),
                _truth(head["degraded"]),
                None if linf is None else _finite(linf),
            )
        case "purified":
            return Purified(arrays["image"], _finite(head["linf"]), _truth(head["degraded"]))
        case "detected":
            return Detected(_finite(head["aid_score"]))
    raise ValueError("kind")


def _pack(head: Mapping[str, object], **arrays: NDArray[Any] | None) -> dict[bytes, bytes]:
    given = {name: array for name, array in arrays.items() if array is not None}
    types = {name: "u1" if array.dtype == np.uint8 else "f4" for name, array in given.items()}
    described = {name: [types[name], *array.shape] for name, array in given.items()}
    fields = {HEAD: json.dumps({**head, "arrays": described}).encode()}
    return fields | {name.encode(): array.astype(TYPES[types[name]]).tobytes() for name, array in given.items()}


def _unpack(fields: Fields) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    try:
        head = json.loads(fields[HEAD])
        arrays = {name: _array(fields[name.encode()], *described) for name, described in head["arrays"].items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise Malformed(str(error)) from None
    return head, arrays


def _array(data: bytes, kind: str, *shape: int) -> NDArray[Any]:
    dtype = TYPES[kind]
    if math.prod(_whole(side) for side in shape) * dtype.itemsize != len(data):
        raise ValueError("an array has another size than its head says")
    array: NDArray[Any] = np.frombuffer(data, dtype).reshape(shape)
    return array


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is none")
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false is neither")
    return value


def _whole(value: object, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TypeError("a whole number is none")
    return value


def _finite(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise TypeError("a number is none")
    return float(value)

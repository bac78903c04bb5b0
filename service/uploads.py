"""The body of a request becomes the bytes of its image, or images, in memory and within limits.

Nothing is written to disk, nothing is inflated, and file names are neither kept nor logged.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from fastapi import Request
from python_multipart.multipart import parse_options_header

from service.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ClarifierError,
    ClientLeft,
    DeadlineExceeded,
    EmptyBody,
    MalformedMultipart,
    Overloaded,
    ShortOfMemory,
    TooManyImages,
    UnsupportedMedia,
    WrongField,
)
from service.request_headers import headers_of
from service.schemas import ParameterProblem

RAW_TYPES = ("", "application/octet-stream", "image/jpeg", "image/jpg", "image/png", "image/webp", "image/bmp")
"""Content types of a raw body. The bytes decide what it is anyway, so none at all (`curl -T`) is fine too."""
WHOLE = "clarifier.whole"
"""In the ASGI scope of a request that has arrived to its end, where the server tells: nothing is waited for."""
QUICK_FORM_BYTES = 16 * 1024
"""A multipart message of no more is taken apart at once: the way to a thread and back would take longer."""
FRAMING_BYTES = 16 * 1024
"""What a multipart message may add to one image: boundaries, part headers, a long file name."""
MAX_HEAD_BYTES = 8 * 1024
MAX_HEAD_LINES = 16
"""Of one part of a multipart message. Browsers send two lines."""
MAX_OPTIONS = 32
"""After the semicolons of one header. Their parser takes time that grows with the square of their number."""
SPARE_PARTS = 64
"""A message may have so many parts more than images: enough to name the first wrong one, not to count a flood."""
BATCH_BODY_IMAGES = 4
"""A batch's body may be this many times the limit of one image, however many images it holds."""
BUDGET_IMAGES = 64
"""Uploads and large answers together may have this many times the limit of one image, or two bodies of batches."""


class Upload(NamedTuple):
    """The bytes of one image, and the media type that its sender declared, empty if none."""

    data: bytes
    declared: str


class ByteBudget:
    """How many bytes of uploads and large answers are in memory, over all requests, and how many may be."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.allowed = math.inf
        """So many for now, where memory is scarce; who holds all that is held may hold more."""

    def account(self) -> Account:
        """A new one."""
        return Account(self)


class Account:
    """What one request holds of a budget: at the end of its `with` block nothing any more."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._held = 0

    def add(self, count: int, *, in_memory: bool = False) -> None:
        """Hold `count` bytes more; `in_memory` they are already, and refusing them would free nothing.

        Raises Overloaded if the budget has not so many left, and ShortOfMemory if it has them, but not now.
        """
        budget = self._budget
        held = budget.held + count
        if held > budget.limit:
            raise Overloaded("too many bytes of uploads and answers are under way", limit=budget.limit)
        if held > budget.allowed and budget.held > self._held and not in_memory:
            raise ShortOfMemory
        budget.held = held
        self._held += count

    def release(self) -> None:
        """The bytes are not in memory any more."""
        self._budget.held -= self._held
        self._held = 0

    def __enter__(self) -> Account:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


async def read_image(
    request: Request, account: Account, parsers: Executor, max_bytes: int, timeout_s: float, deadline: float
) -> Upload:
    """The one image of `request`: its raw body, or its multipart field `image`.

    A large multipart message is taken apart by one of `parsers`. `deadline` is a reading of the monotonic clock.

    Raises UnsupportedMedia, EmptyBody, BodyTooLarge (declared: before reading; else at the first byte over),
    BodyTooSlow, DeadlineExceeded, Overloaded and ShortOfMemory (the budget of `account`), MalformedMultipart,
    WrongField, and ClientLeft.
    """
    content_type, boundary = content_type_of(request)
    if boundary is None:
        if content_type not in RAW_TYPES:
            raise UnsupportedMedia("send an image type, application/octet-stream or multipart/form-data")
        return Upload(await _read(request, account, max_bytes, timeout_s, deadline), content_type)
    body = await _read(request, account, max_bytes + FRAMING_BYTES, timeout_s, deadline)
    if len(body) <= QUICK_FORM_BYTES:
        (upload,) = _images_of(body, boundary, "image", 1, max_bytes)
    else:
        (upload,) = await _images_in_thread(parsers, deadline, body, boundary, "image", 1, max_bytes)
    if isinstance(upload, ClarifierError):
        raise upload
    return upload


async def read_images(
    request: Request,
    account: Account,
    parsers: Executor,
    max_images: int,
    max_bytes: int,
    timeout_s: float,
    deadline: float,
) -> list[bytes | ClarifierError]:
    """The images of a batch, in order: 1 to `max_images` multipart fields `images`.

    BodyTooLarge in the place of one of more than `max_bytes`, UnsupportedMedia in that of one that is declared to be
    something else. Raises as `read_image`, and TooManyImages.
    """
    _, boundary = content_type_of(request)
    if boundary is None:
        headers = headers_of(request.scope)
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            raise EmptyBody
        raise UnsupportedMedia("send multipart/form-data with the images in fields named images")
    body = await _read(request, account, batch_body_bytes(max_images, max_bytes), timeout_s, deadline)
    uploads = await _images_in_thread(parsers, deadline, body, boundary, "images", max_images, max_bytes)
    return [upload if isinstance(upload, ClarifierError) else upload.data for upload in uploads]


async def read_message(
    request: Request, account: Account, media_types: Sequence[str], limit: int, timeout_s: float, deadline: float
) -> bytes:
    """The whole body of `request`, which must be of one of `media_types`. Raises as `read_image`."""
    content_type, _ = content_type_of(request)
    if content_type not in media_types:
        raise UnsupportedMedia(f"send {' or '.join(filter(None, media_types))}")
    return await _read(request, account, limit, timeout_s, deadline)


def budget_bytes(max_images: int, max_bytes: int) -> int:
    """How many bytes of uploads may be in memory at once."""
    return max(BUDGET_IMAGES * max_bytes, 2 * batch_body_bytes(max_images, max_bytes))


def batch_body_bytes(max_images: int, max_bytes: int) -> int:
    """The most bytes that the body of a batch may have."""
    return BATCH_BODY_IMAGES * max_bytes + max_images * FRAMING_BYTES


def content_type_of(request: Request) -> tuple[str, bytes | None]:
    """The content type, and the boundary if it is multipart. Raises UnsupportedMedia, MalformedMultipart."""
    headers = headers_of(request.scope)
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMedia("a Content-Encoding is not accepted: send the body as it is")
    declared = headers.get("content-type", "")
    if declared in RAW_TYPES:
        return declared, None
    if declared.count(";") > MAX_OPTIONS:
        raise UnsupportedMedia("the content type has too many options")
    kind, options = parse_options_header(declared)
    if kind != b"multipart/form-data":
        return kind.decode("latin-1"), None
    boundary = options.get(b"boundary")
    if not boundary:
        raise MalformedMultipart("the content type names no boundary")
    return "multipart/form-data", boundary


async def _read(request: Request, account: Account, limit: int, timeout_s: float, deadline: float) -> bytes:
    """The whole body, within `limit` bytes and `timeout_s` seconds, by `deadline` (of the monotonic clock)."""
    declared = headers_of(request.scope).get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise BodyTooLarge(f"the body may have {limit} bytes", limit=limit, actual=int(declared))
    if WHOLE in request.scope:
        body = await _read_until(request, account, limit)
    else:
        body = await _read_in_time(request, account, limit, timeout_s, deadline)
    if not body:
        raise EmptyBody
    return body


async def _read_in_time(request: Request, account: Account, limit: int, timeout_s: float, deadline: float) -> bytes:
    left_s = deadline - time.monotonic()
    try:
        async with asyncio.timeout(min(timeout_s, left_s)):
            return await _read_until(request, account, limit)
    except TimeoutError:
        if left_s <= timeout_s:  # not by the clock: an event loop's timers may ring a moment early
            raise DeadlineExceeded from None
        raise BodyTooSlow(f"the body must arrive within {timeout_s:g} s") from None


async def _read_until(request: Request, account: Account, limit: int) -> bytes:
    chunks = list[bytes]()
    size = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        more = message.get("more_body", False)
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge(f"the body may have {limit} bytes", limit=limit)
        account.add(len(chunk))
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _images_in_thread(
    parsers: Executor, deadline: float, body: bytes, boundary: bytes, field: str, max_images: int, max_bytes: int
) -> list[Upload | ClarifierError]:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await loop.run_in_executor(parsers, _images_of, body, boundary, field, max_images, max_bytes)
    except TimeoutError:
        raise DeadlineExceeded from None


def _images_of(
    body: bytes, boundary: bytes, field: str, max_images: int, max_bytes: int
) -> list[Upload | ClarifierError]:
    """The files of a multipart body, an error in the place of one that is refused by its part alone.

    Stops at the first part that may not be there.
    """
    images = list[Upload | ClarifierError]()
    for head, content in _parts(body, boundary, max_images + SPARE_PARTS):
        declared = check_part(head, field)
        if len(images) == max_images:
            raise _too_many(field, max_images)
        if field == "image" and not content:
            raise _wrong_field("image", "the file in the field image is empty")
        images.append(checked_upload(content, declared, max_bytes))
    if not images:
        raise _wrong_field(field, f"a file named {field} is missing")
    return images


def checked_upload(content: memoryview, declared: str, max_bytes: int) -> Upload | ClarifierError:
    if len(content) > max_bytes:
        return BodyTooLarge(f"an image may have {max_bytes} bytes", limit=max_bytes, actual=len(content))
    if not (declared in RAW_TYPES or declared.startswith("image/")):  # the bytes decide which kind of image
        return UnsupportedMedia("the part is declared to be no image")
    return Upload(bytes(content), declared)


def _parts(body: bytes, boundary: bytes, max_parts: int) -> Iterator[tuple[bytes, memoryview]]:
    """Head and content of each part (RFC 2046, 5.1.1), found by searching: no step is made per byte of content.

    Nothing may stand before the first boundary, and little after the last. Raises MalformedMultipart.
    """
    delimiter = b"\r\n--" + boundary
    if not body.startswith(delimiter[2:]):
        raise MalformedMultipart("the message does not start with its boundary")
    if body.count(delimiter) > max_parts:
        raise MalformedMultipart(f"the message has more than {max_parts} parts")
    position = len(delimiter) - 2
    while body[position : position + 2] != b"--":
        start = position + 2
        head_end = body.find(b"\r\n\r\n", position, start + MAX_HEAD_BYTES)
        if body[position:start] != b"\r\n" or head_end < 0:
            raise MalformedMultipart("a part has no head, or one that is too long")
        end = body.find(delimiter, head_end + 4)
        if end < 0:
            raise MalformedMultipart("the closing boundary is missing")
        yield body[start:head_end], memoryview(body)[head_end + 4 : end]
        position = end + len(delimiter)
    if len(body) - position > FRAMING_BYTES:
        raise MalformedMultipart("too much follows the closing boundary")


def check_part(head: bytes, field: str) -> str:
    """The declared type of a part. Raises MalformedMultipart or WrongField unless it is a file in `field`."""
    lines = head.split(b"\r\n")
    sound = all(b":" in line and line.count(b";") <= MAX_OPTIONS for line in lines)
    if len(lines) > MAX_HEAD_LINES or not sound:
        raise MalformedMultipart("the head of a part cannot be read")
    headers = {name.strip().lower(): value for name, _, value in (line.partition(b":") for line in lines)}
    _, options = parse_options_header(headers.get(b"content-disposition", b""))
    name = options.get(b"name")
    if name is None:
        raise MalformedMultipart("a part has no name")
    if name != field.encode():
        raise _wrong_field(_printable(name), f"the image goes into a field named {field}")
    if b"filename" not in options:
        raise MalformedMultipart(f"{field} is a text field: send it as a file, with a file name")
    declared, _ = parse_options_header(headers.get(b"content-type", b""))
    if declared.startswith(b"multipart/"):
        raise MalformedMultipart("a part is itself multipart: send the image itself")
    return declared.decode("latin-1")


def _too_many(field: str, max_images: int) -> WrongField | TooManyImages:
    if field == "image":
        return _wrong_field("image", "exactly one image is expected")
    return TooManyImages(f"a request may hold {max_images} images", limit=max_images)


def _wrong_field(name: str, detail: str) -> WrongField:
    return WrongField(detail, errors=[ParameterProblem(pointer=f"#/form/{name}", detail=detail)])


def _printable(name: bytes) -> str:
    """A field name that is safe to show: ASCII letters, digits and a few marks, at most 64 of them."""
    return re.sub(r"[^A-Za-z0-9._\[\]-]", "?", name[:64].decode("latin-1"))

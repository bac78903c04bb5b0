"""A form of any number of images, part by part as it comes (RFC 2046, 5.1.1)."""

from __future__ import annotations

from collections.abc import AsyncIterator

from service.errors import BodyTooLarge, ClarifierError, MalformedMultipart
from service.jobs.body import Body
from service.uploads import MAX_HEAD_BYTES, Upload, check_part, checked_upload

FIELD = "images"


async def form_images(body: Body, boundary: bytes, max_bytes: int) -> AsyncIterator[Upload | ClarifierError]:
    """The files of the fields `images`, an error in the place of one that is refused by its part alone.

    Raises what `body` raises, MalformedMultipart and WrongField.
    """
    delimiter = b"\r\n--" + boundary
    if await body.exactly(len(delimiter) - 2) != delimiter[2:]:
        raise MalformedMultipart("the message does not start with its boundary")
    while (ending := await body.exactly(2)) == b"\r\n":
        head = await body.before(b"\r\n\r\n", MAX_HEAD_BYTES)
        if head is None:
            raise MalformedMultipart("a part has no head, or one that is too long")
        declared = check_part(head, FIELD)
        content = await body.before(delimiter, max_bytes)
        if content is None:
            await body.skip_past(delimiter)
            yield BodyTooLarge(f"an image may have {max_bytes} bytes", limit=max_bytes)
        else:
            yield checked_upload(memoryview(content), declared, max_bytes)
    if ending != b"--":
        raise MalformedMultipart("the message cannot be taken apart at its boundaries")
    await body.skip_rest()

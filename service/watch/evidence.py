"""Evidence: what some of the requests whose image looked unnatural to AID held, for people who look into an attack.

Pixels of clients are kept nowhere else. So this is off unless asked for; what is kept is a sample; each case is a file
that is encrypted to a public key before it is written (age, https://age-encryption.org/v1), so that this service
cannot read what it has kept; and files are deleted when their time is over.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import secrets
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from service.errors import ClarifierError
from service.images import encode_pixels, to_bytes
from service.queue import Completed
from service.settings import PREFIX, Settings, SettingsError
from service.watch.cases import Case, run_again, run_in_batches
from service.watch.inbox import Inbox
from service.work import Floats, Key, Operation, Purified

if TYPE_CHECKING:  # which has one of these
    from pyrage import x25519

    from service.gateway import Gateway

logger = logging.getLogger(__name__)

GATHER_S = 0.25
"""For company: what is purified again runs together."""
SWEEP_S = 60.0
"""Between two looks for files whose time is over."""
MAX_FILES = 10_000
"""In the folder: who sends attacks decides how many cases there are, and must not fill a disk."""
NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{16}\.zip\.age")
"""Of our files: nothing else in the folder is counted or deleted."""


@dataclass(frozen=True, slots=True)
class Flagged:
    """A case, and why it is one."""

    case: Case
    score: float
    """Of AID."""

    @property
    def purify_key(self) -> Key | None:
        """What makes its purified image; None where nothing was purified."""
        asked = self.case.key
        if asked.operation is Operation.DETECT or asked.defense == "none":
            return None
        return Key(Operation.PURIFY, asked.model, asked.defense, floats=asked.floats, digest=asked.digest)


def check_evidence(settings: Settings) -> x25519.Recipient | None:
    """Whom evidence is encrypted to; None if none is kept. Raises SettingsError if it cannot be."""
    if settings.evidence_dir is None:
        return None
    try:
        from pyrage import RecipientError, x25519
    except ModuleNotFoundError:
        raise SettingsError(f"{PREFIX}EVIDENCE_DIR is set, which needs the extra `evidence`") from None
    try:
        recipient = x25519.Recipient.from_str(settings.evidence_recipient or "")
    except RecipientError:
        raise SettingsError(f"{PREFIX}EVIDENCE_RECIPIENT is no public key of age, age1...") from None
    if not (settings.evidence_dir.is_dir() and os.access(settings.evidence_dir, os.W_OK | os.X_OK)):
        raise SettingsError(f"{PREFIX}EVIDENCE_DIR: {settings.evidence_dir} is no folder that can be written to")
    return recipient


class Evidence:
    """Keeps a share of what is noted, encrypted to `recipient`."""

    def __init__(self, gateway: Gateway, recipient: x25519.Recipient) -> None:
        settings = gateway.settings
        assert settings.evidence_dir is not None
        self._gateway = gateway
        self._recipient = recipient
        self._folder: Path = settings.evidence_dir
        self._rate, self._days = settings.evidence_rate, settings.evidence_days
        self._files = 0
        self._inbox = Inbox[Flagged]()

    def note(self, case: Case, score: float) -> None:
        """AID has found the image of `case` unnatural."""
        if not self._gateway.entropy.happens(self._rate):
            return
        if self._files >= MAX_FILES or not self._inbox.put(Flagged(case, score), case.image.nbytes):
            self._count("skipped", 1)

    async def run(self) -> None:
        """For ever."""
        while True:
            flagged = await self._inbox.take(GATHER_S)
            most = self._gateway.settings.max_batch_size
            await run_in_batches(flagged, attrgetter("purify_key"), most, self._keep_all)

    async def sweep(self) -> None:
        """For ever: delete what is older than it may be."""
        while True:
            try:
                self._files = await asyncio.to_thread(sweep, self._folder, self._days)
            except OSError:
                logger.exception("old evidence could not be looked for")
            await asyncio.sleep(SWEEP_S)

    async def _keep_all(self, key: Key | None, flagged: Sequence[Flagged]) -> None:
        purified = [None] * len(flagged) if key is None else await self._purify(key, flagged)
        for one, image in zip(flagged, purified, strict=True):
            try:
                await asyncio.to_thread(self._keep, one, image)
            except Exception:
                logger.exception("evidence could not be kept")
                self._count("failed", 1)
            else:
                self._files += 1
                self._count("kept", 1)

    async def _purify(self, key: Key, flagged: Sequence[Flagged]) -> list[Floats | None]:
        """The purified images with the seeds that were used; None where there was no time for one."""
        try:
            outcomes = await run_again(self._gateway, key, [one.case for one in flagged])
        except ClarifierError:  # the engine is for those who wait for an answer now
            return [None] * len(flagged)
        answers = [outcome.answer if isinstance(outcome, Completed) else None for outcome in outcomes]
        return [answer.image if isinstance(answer, Purified) else None for answer in answers]

    def _keep(self, flagged: Flagged, purified: Floats | None) -> None:
        from pyrage import encrypt

        now = time.time()
        sealed = encrypt(pack(flagged, purified, now), [self._recipient])
        name = f"{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(8)}.zip.age"
        partial = self._folder / f".{name}"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(sealed)
            partial.rename(self._folder / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _count(self, outcome: str, cases: int) -> None:
        self._gateway.metrics.evidence.labels(outcome).inc(cases)


def pack(flagged: Flagged, purified: Floats | None, now: float) -> bytes:
    """A zip of `case.json`, `input.png` (and `input.npy` where numbers came), and `purified.png` if there is one."""
    case, key = flagged.case, flagged.case.key
    said: dict[str, Any] = {
        "time": datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
        "request_id": case.request_id,
        "key": case.client,
        "operation": key.operation.value,
        "model": key.model,
        "digest": key.digest,
        "defense": key.defense,
        "votes": key.votes,
        "seed": case.seed,
        "aid_score": flagged.score,
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("case.json", json.dumps(said, indent=2))
        archive.writestr("input.png", encode_pixels(_pixels(case.image), "image/png"))
        if case.image.dtype != np.uint8:
            numbers = io.BytesIO()
            np.save(numbers, case.image)
            archive.writestr("input.npy", numbers.getvalue())
        if purified is not None:
            archive.writestr("purified.png", encode_pixels(to_bytes(purified), "image/png"))
    return file.getvalue()


def _pixels(image: Any) -> Any:
    return image if image.dtype == np.uint8 else to_bytes(image)


def sweep(folder: Path, days: float) -> int:
    """Delete the evidence in `folder` that is older than `days`; how much is left."""
    oldest, left = time.time() - days * 86_400, 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if not NAME.fullmatch(entry.name.removeprefix(".")):
                continue
            try:
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry)
                else:
                    left += 1
            except FileNotFoundError:  # another gateway was faster
                continue
    return left

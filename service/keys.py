"""API keys: a file of names and hashes, and `python -m service.keys NAME`, which makes a new one."""

from __future__ import annotations

import argparse
import hashlib
import re
import secrets
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from service.rates import RateLimits, read_rate_limits
from service.settings import PREFIX, SettingsError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
KEY_BYTES = 32
KEY_PREFIX = "clarifier_"
"""So that people, and programs that look for secrets in the wrong places, recognize a key."""


class Right(StrEnum):
    """What a key may do only if its entry says so."""

    EXPLAIN = "explain"
    """`explain=true`: what it adds helps an attacker who climbs on it as much as an operator."""
    COSTLY = "costly"
    """Defenses that descend at test time: one image keeps the engine for as long as dozens of others."""
    JOBS = "jobs"
    """Work that is not waited for."""


class Entry(BaseModel):
    """Frozen; a field that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ApiKey(Entry):
    """What the file says about a key: not the key."""

    name: Annotated[str, Field(pattern=NAME)]
    """For logs."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    rights: frozenset[Right] = frozenset()
    rate_limit: Annotated[RateLimits, PlainValidator(read_rate_limits)] | None = None
    """Instead of CLARIFIER_RATE_LIMIT."""


class KeysFile(Entry):
    """A TOML file with a table `[[key]]` for each key."""

    key: Annotated[tuple[ApiKey, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("name", "sha256"):
            if twice := _repeated(getattr(key, field) for key in self.key):
                names = sorted({key.name for key in self.key if getattr(key, field) == twice})
                raise ValueError(f"two keys have the same {field}: {' and '.join(names)}")
        return self


def _repeated(values: Iterable[str]) -> str | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)


def digest_of(secret: bytes) -> bytes:
    """What is kept of a key, and what it is found by.

    One SHA-256 is enough: a key has 256 random bits, so there is no dictionary to try that a slow, salted hash would
    make expensive. And a look-up may take the time it takes: that tells of digests at most, from which no key follows.
    """
    return hashlib.sha256(secret).digest()


def read_keys(path: Path) -> Mapping[bytes, ApiKey]:
    """The keys of the file at `path`, by their digests. Raises SettingsError, whose message shows nothing of them."""
    try:
        keys = KeysFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).key
    except OSError as error:
        raise _wrong(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise _wrong(_first_problem(error)) from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise _wrong(f"{path} is not a TOML file: {error}") from None
    return {bytes.fromhex(key.sha256): key for key in keys}


def _wrong(why: str) -> SettingsError:
    return SettingsError(f"{PREFIX}API_KEYS_FILE: {why}")


def _first_problem(error: ValidationError) -> str:
    """Where and what, without the value: it may be a key, where its hash should stand."""
    problem = error.errors(include_url=False, include_input=False)[0]
    place = " ".join(str(part + 1) if isinstance(part, int) else part for part in problem["loc"])
    why = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {why}" if place else why


def new_key() -> str:
    """A key that nobody has."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def _name(text: str) -> str:
    if not re.fullmatch(NAME, text):
        raise argparse.ArgumentTypeError("1 to 64 letters, digits and . _ -, the first a letter or digit")
    return text


def main() -> None:
    """Print a new key, which is kept nowhere, on standard error, and its entry on standard output."""
    parser = argparse.ArgumentParser(
        prog="python -m service.keys",
        description="Make an API key. It is shown once, on standard error; "
        "its entry for CLARIFIER_API_KEYS_FILE goes to standard output: python -m service.keys NAME >> keys.toml",
    )
    parser.add_argument("name", type=_name, metavar="NAME", help="whose key it is, for logs")
    name, key = parser.parse_args().name, new_key()
    print(f"The key, shown this once: {key}", file=sys.stderr)
    print(f'\n[[key]]\nname = "{name}"\nsha256 = "{digest_of(key.encode()).hex()}"')
    print('# rights = ["explain", "costly", "jobs"]\n# rate_limit = "600/minute"')


if __name__ == "__main__":
    main()

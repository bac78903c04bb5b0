"""Who may ask, what, and how often. Everything is refused here before a body is read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address
from pathlib import Path

from fastapi import Depends, Request, params
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.types import Scope

from service.errors import Forbidden, TooManyImages, Unauthorized
from service.keys import ApiKey, Right, digest_of, read_keys
from service.rates import Limiter, RateLimits, Windows, read_rate_limits
from service.record import record_of
from service.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

MAX_KEY_BYTES = 256
"""Of a key that is looked at; those that we make have 53."""
BEARER = b"bearer "
SCHEMES = (
    HTTPBearer(scheme_name="bearer", description="`Authorization: Bearer KEY`", auto_error=False),
    APIKeyHeader(name="X-API-Key", scheme_name="header", description="`X-API-Key: KEY`", auto_error=False),
)
"""Two ways to send a key, for OpenAPI."""
NETWORK_BITS = 64
"""Of an IPv6 address: the rest is its owner's to choose, anew for every request."""


class Access:
    """The keys and limits of an application. One that has neither has no Access, and spends no time on it."""

    def __init__(self, keys: Mapping[bytes, ApiKey] | None, limits: RateLimits, limiter: Limiter) -> None:
        self._keys = keys
        self._limits = limits
        self._limiter = limiter

    def read_again(self, path: Path) -> None:
        """From now on the keys are those in the file at `path`; if that cannot be used they stay as they are."""
        try:
            self._keys = read_keys(path)
        except SettingsError as error:
            logger.error("%s: the keys are what they were", error)
        else:
            logger.info("%d keys", len(self._keys))

    async def admit(self, scope: Scope) -> None:
        """Note whose request this is, and count it. Raises Unauthorized, RateLimited."""
        if self._keys is not None:
            key = scope["clarifier.key"] = _find(self._keys, scope["headers"])
            record_of(scope).key = key.name
        who, limits = self._owner(scope)
        await self._limiter.hit(who, limits)

    async def count_images(self, scope: Scope, images: int) -> None:
        """Count the images of an admitted batch, of which `admit` counted one. Raises TooManyImages, RateLimited."""
        who, limits = self._owner(scope)
        for limit in limits:
            if images > limit.amount:  # no wait would help
                raise TooManyImages(f"the rate limit is {limit}", limit=limit.amount, actual=images)
        if images > 1:
            await self._limiter.hit(who, limits, images - 1)

    def _owner(self, scope: Scope) -> tuple[str, RateLimits]:
        """Whose hit a request is, and how many that one has."""
        key = key_of(scope)
        limits = self._limits if key is None or key.rate_limit is None else key.rate_limit
        return owner_of(scope), limits

    def guards(self) -> list[params.Depends]:
        """What the framework does before its routes that need a key, and says about all that do."""
        schemes = () if self._keys is None else SCHEMES
        return [Depends(guard) for guard in (self._guard, *schemes)]

    async def _guard(self, request: Request) -> None:
        await self.admit(request.scope)


def create_access(settings: Settings, windows: Windows) -> Access | None:
    """What `settings` ask for, with hits in `windows`; None if everybody may ask as often as they like.

    Raises SettingsError.
    """
    path, rate_limit = settings.api_keys_file, settings.rate_limit
    keys = None if path is None else read_keys(path)
    if keys is None and rate_limit is None:
        return None
    return Access(keys, () if rate_limit is None else read_rate_limits(rate_limit), Limiter(windows))


def key_of(scope: Scope) -> ApiKey | None:
    """The key of an admitted request; None where nobody has one."""
    key = scope.get("clarifier.key")
    assert key is None or isinstance(key, ApiKey)
    return key


def owner_of(scope: Scope) -> str:
    """Who asks: the name of the request's key, or, where there are no keys, the address."""
    key = key_of(scope)
    return address_of(scope) if key is None else key.name


def require(scope: Scope, right: Right) -> None:
    """Raises Forbidden if the request's key lacks `right`. Where nobody has a key, everybody has every right."""
    key = key_of(scope)
    if key is not None and right not in key.rights:
        raise Forbidden(f"the key has no right `{right}`")


def _find(keys: Mapping[bytes, ApiKey], headers: Iterable[tuple[bytes, bytes]]) -> ApiKey:
    shown = _shown(headers)
    if not shown:
        raise Unauthorized("no key was sent")
    if len(shown) > 1 and len(set(shown)) > 1:
        raise Unauthorized("two different keys were sent")
    key = keys.get(digest_of(shown[0])) if len(shown[0]) <= MAX_KEY_BYTES else None
    if key is None:
        raise Unauthorized("the key is not known here")
    return key


def _shown(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """The keys that a request shows, and of what is too long for one so much that it stays too long.

    An Authorization of another scheme is none of ours: it may be meant for a proxy.
    """
    shown: list[bytes] = []
    for name, value in headers:
        if name == b"x-api-key":
            shown.append(value[: MAX_KEY_BYTES + 1])
        elif name == b"authorization" and value[: len(BEARER)].lower() == BEARER:
            shown.append(value[len(BEARER) : len(BEARER) + MAX_KEY_BYTES + 1])
    return shown


def address_of(scope: Scope) -> str:
    """The address whose hits are counted together: of IPv6 the network, which is one customer's."""
    client = scope.get("client")
    host = client[0] if client else ""
    return _network(host) if ":" in host else host


@lru_cache(1024)
def _network(host: str) -> str:
    try:
        address = IPv6Address(host)
    except AddressValueError:
        return host
    if address.ipv4_mapped is not None:  # on a socket that takes both
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> 128 - NETWORK_BITS << 128 - NETWORK_BITS))

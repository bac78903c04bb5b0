"""What can be wrong with a Redis: how each fault begins, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from redis import Redis

from tests.service.own_proxy import Proxy
from tests.service.own_redis import OwnRedis

Change = Callable[[OwnRedis, Proxy], object]


@dataclass(frozen=True)
class Fault:
    """A Redis behind a proxy that both work, until `begin`, and again from `end` on."""

    name: str
    begin: Change
    end: Change
    keeps: bool = True
    """Whether it has what it had, when it is back."""


def _set_proxy(name: str, begin: object, end: object) -> Fault:
    return Fault(name, lambda _, proxy: setattr(proxy, name, begin), lambda _, proxy: setattr(proxy, name, end))


def _configure(name: str, setting: str, begin: int, end: int) -> Fault:
    return Fault(
        name,
        lambda redis, _: redis.client().config_set(setting, begin),
        lambda redis, _: redis.client().config_set(setting, end),
    )


def _hang_up(_: OwnRedis, proxy: Proxy) -> None:
    proxy.refusing = True
    proxy.cut()


def _lock(redis: OwnRedis, proxy: Proxy) -> None:
    redis.client().config_set("requirepass", "another")
    proxy.cut()  # whoever is connected is known


def _unlock(redis: OwnRedis, _: Proxy) -> None:
    with Redis(port=redis.port, password="another") as client:
        client.config_set("requirepass", "")


FAULTS = [
    Fault("killed", lambda redis, _: redis.kill(), lambda redis, _: redis.start(), keeps=False),
    _set_proxy("delay_s", 5.0, 0.0),
    _set_proxy("held", True, False),
    Fault("refused", _hang_up, lambda _, proxy: setattr(proxy, "refusing", False)),
    Fault(
        "read-only",
        lambda redis, _: redis.client().replicaof("127.0.0.1", "1"),
        lambda redis, _: redis.client().replicaof("NO", "ONE"),
    ),
    Fault("password", _lock, _unlock),
    _configure("memory", "maxmemory", 1, 0),
]

"""What a gateway learns of the workers, and what it asks for where they disagree."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from service.metrics import Metrics
from service.remote.roster import Roster
from service.remote.store import BUNDLE, Announcement, Store
from service.repository import Catalog
from tests.service import own_redis
from tests.service.conftest import until
from tests.service.farm import Farm, classify, ready
from tests.service.manifests import fake_manifest
from tests.service.own_redis import EchoBundle

DIGEST = EchoBundle().digest


class Told:
    """Stands in for a store: who works, and what bundles are."""

    def __init__(self) -> None:
        self.workers: dict[str, Announcement] = {}
        self.unknown = set[str]()
        self.asked = list[str]()

    async def roster(self) -> dict[str, Announcement]:
        return self.workers

    async def bundle(self, digest: str) -> dict[str, Any] | None:
        self.asked.append(digest)
        manifest = fake_manifest().model_dump(mode="json")
        return None if digest in self.unknown else {"manifest": manifest, "report": {}}


def worker(**bundles: str) -> Announcement:
    return Announcement(bundles={f"{name}@1": digest for name, digest in bundles.items()}, device="cpu", engine="torch")


def test_what_more_workers_have_is_asked_for_and_each_bundle_is_fetched_once() -> None:
    told, catalogs = Told(), list[Catalog]()
    roster = Roster(cast(Store, told), Metrics(), catalogs.append)

    async def look(*workers: Announcement) -> None:
        told.workers = {str(number): announced for number, announced in enumerate(workers)}
        await roster.look()

    async def scenario() -> None:
        await look()
        assert (roster.workers, roster.digests, catalogs) == (0, {}, [])
        await look(worker(a="old"), worker(a="old"), worker(a="new", b="other"))
        assert (roster.workers, roster.digests) == (3, {"a@1": "old", "b@1": "other"})
        await look(worker(a="old"), worker(a="new", b="other"), worker(a="new"))
        assert roster.digests == {"a@1": "new", "b@1": "other"}
        await look(worker(a="old"))
        assert roster.digests == {"a@1": "old"}
        assert roster.bundles.keys() == {"old", "new", "other"}, "a worker may still have what was served"
        await look()
        assert roster.digests == {}

    asyncio.run(scenario())
    assert [sorted(catalog.bundles) for catalog in catalogs] == [["a@1", "b@1"], ["a@1", "b@1"], ["a@1"], []]
    assert sorted(told.asked) == ["new", "old", "other"]


def test_what_nobody_can_describe_is_left_out_until_somebody_can(caplog: pytest.LogCaptureFixture) -> None:
    told, catalogs = Told(), list[Catalog]()
    roster = Roster(cast(Store, told), Metrics(), catalogs.append)
    told.workers = {"1": worker(a="known", b="unknown")}
    told.unknown = {"unknown"}
    for _ in range(2):
        asyncio.run(roster.look())
    assert roster.digests == {"a@1": "known"}
    assert caplog.messages == ["Redis does not tell what b@1 is: unknown is left out"]
    told.unknown.clear()
    asyncio.run(roster.look())
    assert roster.digests == {"a@1": "known", "b@1": "unknown"}
    assert len(catalogs) == 2


@pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)
def test_a_bundle_that_nobody_can_describe_is_said_once(farm: Farm, caplog: pytest.LogCaptureFixture) -> None:
    farm.worker()
    ready(farm.gateway())
    caplog.set_level("INFO")
    client = farm.redis.client()
    client.set(BUNDLE + DIGEST, "[")  # the worker sees only that there is something
    late = farm.gateway()
    client.config_resetstat()
    until(lambda: client.info("commandstats").get("cmdstat_get", {}).get("calls", 0) >= 5)
    assert late.client.get("/readyz").status_code == 503
    said = [line.message for line in caplog.records if line.name == "service.remote.roster"]
    assert said.count(f"Redis does not tell what colors@1 is: {DIGEST[:12]} is left out") == 1
    assert not [line for line in said if line.startswith("served by")]
    client.delete(BUNDLE + DIGEST)  # its worker sees that, and describes it again
    ready(late)
    assert classify(late).status_code == 200

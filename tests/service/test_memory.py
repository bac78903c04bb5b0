"""Short of memory, requests are refused, and nothing dies."""

from __future__ import annotations

import asyncio
import io
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import httpx
import numpy as np
import pytest
from PIL import Image

from service import memory as watched
from service.app import allow
from service.errors import Overloaded, ShortOfMemory
from service.memory import FIRST, INTERVAL_S, SECOND, Group, Layout, Memory, _folders, find_memory, watch_memory
from service.uploads import ByteBudget
from tests.service.conftest import running, until
from tests.service.fakes import FakeBundle, green, png
from tests.service.test_main import process

MIB = 2**20
GREEN = (0, 255, 0)
NONE = {FIRST: 9223372036854771712, SECOND: "max"}
"""How no limit is said."""


def write_group(folder: Path, layout: Layout, limit: object, used: int, inactive: int = 0, active: int = 0) -> None:
    """A group of whose active page cache a MiB is mapped."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in layout.limits:
        (folder / name).write_text(f"{limit}\n")
    (folder / layout.used).write_text(f"{used}\n")
    stat = {"anon": 1, layout.inactive: inactive, layout.active: active, layout.mapped: MIB}
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))


@pytest.fixture(params=[FIRST, SECOND])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Layout]:
    """The root of a file system, where its groups are, and how they look; this process is in `pod/container`."""
    layout = cast(Layout, request.param)
    (tmp_path / "proc/self").mkdir(parents=True)
    lines = {FIRST: "9:name=systemd:/\n4:memory:/pod/container\n3:cpu:/\n", SECOND: "0::/pod/container\n"}
    (tmp_path / "proc/self/cgroup").write_text(lines[layout])
    groups = tmp_path / ("sys/fs/cgroup/memory" if layout is FIRST else "sys/fs/cgroup")
    return tmp_path, groups, layout


def test_what_is_left_is_the_least_of_all_groups_and_what_the_kernel_can_drop_is_free(
    machine: tuple[Path, Path, Layout],
) -> None:
    root, groups, layout = machine
    write_group(groups, layout, NONE[layout], 10_000 * MIB)
    write_group(groups / "pod", layout, 1600 * MIB, 1000 * MIB)
    write_group(groups / "pod/container", layout, 800 * MIB, 900 * MIB, inactive=200 * MIB, active=101 * MIB)
    memory = find_memory(root)
    assert memory.spare == 150 * MIB, "200 MiB, but for a sixteenth of the limit"
    write_group(groups / "pod", layout, 1600 * MIB, 1590 * MIB)
    memory.look()
    assert memory.spare == 0
    write_group(groups / "pod", layout, 16_000 * MIB, 15_822 * MIB)
    memory.look()
    assert memory.spare == 50 * MIB, "no more than 128 MiB is kept"
    write_group(groups / "pod", layout, NONE[layout], 15_822 * MIB)
    memory.look()
    assert memory.spare == 150 * MIB, "a limit may be lifted"


def test_where_the_kernel_slows_down_is_a_limit(tmp_path: Path) -> None:
    write_group(tmp_path, SECOND, 1600 * MIB, 100 * MIB)
    (tmp_path / "memory.high").write_text(f"{800 * MIB}\n")
    assert Memory([Group(tmp_path, SECOND)]).spare == 650 * MIB


def test_a_group_whose_own_folder_cannot_be_seen_is_found_at_the_top(machine: tuple[Path, Path, Layout]) -> None:
    root, groups, layout = machine
    write_group(groups, layout, 800 * MIB, 100 * MIB)
    assert find_memory(root).spare == 650 * MIB


def test_without_a_limit_or_groups_there_is_no_end_of_it(machine: tuple[Path, Path, Layout], tmp_path: Path) -> None:
    root, groups, layout = machine
    for place in (root, tmp_path / "elsewhere"):
        assert not find_memory(place).groups
    write_group(groups / "pod", layout, NONE[layout], 100 * MIB)
    assert find_memory(root).spare == math.inf
    with find_memory(root).promise(2**60):
        pass


def test_a_group_that_is_not_told_of_any_more_limits_nothing(machine: tuple[Path, Path, Layout]) -> None:
    root, groups, layout = machine
    write_group(groups, layout, 800 * MIB, 100 * MIB)
    write_group(groups / "pod", layout, 800 * MIB, 790 * MIB)
    memory = find_memory(root)
    assert memory.spare == 0
    (groups / "pod/memory.stat").unlink()
    memory.look()
    assert memory.spare == 650 * MIB


@pytest.fixture
def group_of(tmp_path: Path) -> Callable[[int], Memory]:
    """A memory of 1600 MiB of which so many MiB are used."""

    def write(used: int) -> Memory:
        write_group(tmp_path, SECOND, 1600 * MIB, used * MIB)
        return Memory([Group(tmp_path, SECOND)])

    return write


def test_it_is_looked_at_again_and_again_whatever_happens(
    group_of: Callable[[int], Memory], caplog: pytest.LogCaptureFixture
) -> None:
    memory = group_of(1000)
    seen = list[float]()

    def looked() -> None:
        seen.append(memory.spare // MIB)
        if len(seen) == 1:
            group_of(1001)
            raise RuntimeError("on purpose")

    async def scenario() -> None:
        watching = asyncio.create_task(watch_memory(memory, looked))
        async with asyncio.timeout(20):
            while len(seen) < 2:
                await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(scenario())
    assert seen[:2] == [500, 499]
    assert "stumbled" in caplog.text


def test_what_the_c_library_keeps_is_handed_back_now_and_then_where_little_is_left(
    group_of: Callable[[int], Memory], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    trims = list[int]()

    def trim() -> None:
        trims.append(1)
        group_of(1000)

    monkeypatch.setattr(watched, "_trim", trim)
    memory = group_of(1000)
    memory.look()
    assert not trims
    group_of(1590)
    memory.look()
    assert (memory.spare, len(trims)) == (500 * MIB, 1)
    group_of(1590)
    memory.look()
    assert (memory.spare, len(trims)) == (0, 1), "not again so soon"
    group_of(1000)
    memory.look()
    assert caplog.messages == ["memory is short", "there is memory again"]


def test_what_is_promised_in_memory_and_small_things_have_the_reserve(group_of: Callable[[int], Memory]) -> None:
    memory = group_of(1400)
    with memory.promise(60 * MIB):
        assert memory.promised == 60 * MIB
        with pytest.raises(ShortOfMemory), memory.promise(41 * MIB):
            pass
        with memory.promise(40 * MIB):
            pass
    assert memory.promised == 0
    group_of(1600)
    memory.look()
    with memory.promise(50 * MIB), pytest.raises(ShortOfMemory), memory.promise(1):
        pass
    with pytest.raises(ShortOfMemory), memory.promise(51 * MIB):
        pass


def test_a_budget_holds_no_more_than_is_allowed_for_now_but_for_who_is_alone() -> None:
    budget = ByteBudget(100)
    first, second = budget.account(), budget.account()
    budget.allowed = 40
    first.add(40)
    with pytest.raises(ShortOfMemory):
        second.add(1)
    first.add(20)
    second.add(10, in_memory=True)
    with pytest.raises(ShortOfMemory):
        first.add(1)
    with pytest.raises(Overloaded):
        second.add(31, in_memory=True)
    first.release()
    second.add(1)


def test_uploads_may_have_half_of_what_requests_may(group_of: Callable[[int], Memory]) -> None:
    with running(FakeBundle()) as service:
        gateway = service.gateway
        allow(gateway)
        assert gateway.uploads.allowed == math.inf
        gateway.memory = group_of(1400)
        gateway.uploads.held = 40 * MIB
        with gateway.memory.promise(20 * MIB):
            allow(gateway)
        gateway.uploads.held = 0
        assert gateway.uploads.allowed == (40 + 20 + 100) / 2 * MIB


def test_row_78_short_of_memory_what_would_take_much_is_refused_and_what_takes_little_is_not(
    group_of: Callable[[int], Memory],
) -> None:
    with running(FakeBundle()) as service:
        service.gateway.memory = group_of(1600)
        large = np.full((1300, 1300, 3), GREEN, np.uint8)
        for path in ("/classify", "/purify?size=original"):
            refused = service.client.post(path, content=png(large))
            assert int(refused.headers["retry-after"]) >= 1
            service.refuses(refused, 503, "short_of_memory")
        service.gateway.memory = Memory()
        assert service.client.post("/classify?defense=none", content=png(large)).status_code == 200


@pytest.fixture
def group() -> Iterator[Group]:
    """A control group below that of this process. Skips where none can be made."""
    folders = _folders(Path("/"))
    if not folders:
        pytest.skip("there are no control groups here")
    folder, layout = folders[0]
    own = folder / f"clarifier-test-{os.getpid()}"
    try:
        own.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    if (own / layout.limits[0]).exists():
        yield Group(own, layout)
        until(lambda: not (own / "cgroup.procs").read_text())
        own.rmdir()
    else:
        own.rmdir()
        pytest.skip("a control group made here cannot limit memory")


def bulky() -> bytes:
    """A PNG of 9 MB."""
    file = io.BytesIO()
    Image.fromarray(np.full((1700, 1700, 3), GREEN, np.uint8)).save(file, "PNG", compress_level=0)
    return file.getvalue()


def flat() -> bytes:
    """A PNG of some kB and 30 million pixels."""
    return png(np.full((5000, 6000, 3), GREEN, np.uint8))


@pytest.mark.slow
def test_row_78_at_the_limit_of_its_control_group_it_sheds_load_and_is_not_killed(group: Group) -> None:
    limit = group.folder / group.layout.limits[0]
    limit.write_text(str(4096 * MIB))
    photo, bomb = bulky(), flat()
    with process(0, enter=str(group.folder / "cgroup.procs")) as (started, client):
        limit.write_text(str(group.used() + 200 * MIB))
        time.sleep(2 * INTERVAL_S)  # until it has seen that

        def ask(number: int) -> int:
            content = bomb if number % 4 == 0 else photo
            return httpx.post(f"{client.base_url}/classify?defense=none", content=content, timeout=60).status_code

        with ThreadPoolExecutor(48) as clients:
            statuses = Counter(clients.map(ask, range(96)))
        assert started.poll() is None
        assert set(statuses) == {200, 503}
        assert client.post("/classify?defense=none", content=png(green())).status_code == 200

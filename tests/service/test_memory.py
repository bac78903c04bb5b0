"""Short of memory, requests are refused, and nothing dies."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import numpy as np
import pytest
from PIL import Image

from service.errors import Overloaded, ShortOfMemory
from service.memory import FIRST, SECOND, Group, Layout, Memory, _folders, find_memory, watch_memory
from service.uploads import ByteBudget
from tests.service.conftest import running, until
from tests.service.fakes import FakeBundle, green, png
from tests.service.farm import classify
from tests.service.test_main import process

MIB = 2**20


def write_group(folder: Path, layout: Layout, limit: object, used: int, droppable: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / layout.limit).write_text(f"{limit}\n")
    (folder / layout.used).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{layout.droppable} {droppable}\n")


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
    write_group(groups, layout, "max" if layout is SECOND else 9223372036854771712, 10_000 * MIB)
    write_group(groups / "pod", layout, 1600 * MIB, 1000 * MIB)
    write_group(groups / "pod/container", layout, 800 * MIB, 900 * MIB, droppable=300 * MIB)
    memory = find_memory(root)
    assert memory is not None
    assert memory.left == 200 * MIB
    assert memory.spare == 150 * MIB, "a sixteenth of the limit is kept"
    write_group(groups / "pod", layout, 1600 * MIB, 1590 * MIB)
    memory.look()
    assert (memory.left, memory.spare) == (10 * MIB, 0)
    write_group(groups / "pod", layout, 3200 * MIB, 1590 * MIB)
    memory.look()
    assert memory.left == 200 * MIB, "a limit may change"


def test_a_group_whose_own_folder_cannot_be_seen_is_found_at_the_top(machine: tuple[Path, Path, Layout]) -> None:
    root, groups, layout = machine
    write_group(groups, layout, 800 * MIB, 100 * MIB)
    memory = find_memory(root)
    assert memory is not None
    assert memory.left == 700 * MIB


def test_without_a_limit_nobody_looks(machine: tuple[Path, Path, Layout], tmp_path: Path) -> None:
    root, groups, layout = machine
    assert find_memory(root) is None
    assert find_memory(tmp_path / "elsewhere") is None
    write_group(groups / "pod", layout, "max", 100 * MIB)
    (groups / "pod/container").mkdir()
    assert find_memory(root) is None


def test_what_the_kernel_does_not_tell_any_more_stays_as_it_was(machine: tuple[Path, Path, Layout]) -> None:
    root, groups, layout = machine
    write_group(groups, layout, 800 * MIB, 100 * MIB)
    memory = find_memory(root)
    assert memory is not None
    (groups / "memory.stat").unlink()
    memory.look()
    assert memory.left == 700 * MIB


def test_it_is_looked_at_again_and_again(tmp_path: Path) -> None:
    write_group(tmp_path, SECOND, 800 * MIB, 100 * MIB)
    memory = Memory([Group(tmp_path, SECOND)])
    seen = list[int]()

    async def scenario() -> None:
        watching = asyncio.create_task(watch_memory(memory, lambda memory: seen.append(memory.left // MIB)))
        async with asyncio.timeout(20):
            while len(seen) < 2:
                write_group(tmp_path, SECOND, 800 * MIB, (100 + len(seen)) * MIB)
                await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(scenario())
    assert seen[:2] == [700, 699]


def test_a_budget_holds_no_more_than_is_allowed_for_now() -> None:
    budget = ByteBudget(100)
    account = budget.account()
    budget.allowed = 40
    account.add(40)
    with pytest.raises(ShortOfMemory):
        account.add(1)
    account.release()
    account.add(40)
    budget.allowed = 1000
    with pytest.raises(Overloaded):
        account.add(61)
    account.add(60)


def test_row_78_short_of_memory_one_request_at_a_time_is_let_in() -> None:
    with running(FakeBundle()) as service, ThreadPoolExecutor(1) as other:
        service.gateway.memory = cast(Memory, SimpleNamespace(spare=0))
        assert classify(service).status_code == 200
        service.bundle.gate.clear()
        first = other.submit(classify, service)
        until(lambda: service.gateway._in_flight)
        refused = classify(service)
        service.bundle.gate.set()
        assert first.result().status_code == 200
        service.refuses(refused, 503, "short_of_memory")


@pytest.fixture
def group() -> Iterator[Group]:
    """A control group below that of this process. Skips where none can be made."""
    folders = _folders(Path("/"))
    if not folders:
        pytest.skip("there are no control groups here")
    folder, layout = folders[0]
    own = folder / "clarifier-test"
    try:
        own.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    try:
        if not (own / layout.limit).exists():
            pytest.skip("a control group made here cannot limit memory")
        yield Group(own, layout)
        until(lambda: not (own / "cgroup.procs").read_text())
    finally:
        own.rmdir()


@pytest.mark.slow
def test_row_78_at_the_limit_of_its_control_group_it_sheds_load_and_is_not_killed(group: Group) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    photo = file.getvalue()
    limit = group.folder / group.layout.limit
    limit.write_text(str(4096 * MIB))
    with process(0, enter=str(group.folder / "cgroup.procs")) as (started, client):
        used = 4096 * MIB - group.left()
        limit.write_text(str(used + 200 * MIB))

        def ask(_: int) -> int:
            return httpx.post(f"{client.base_url}/classify", content=photo, timeout=60).status_code

        with ThreadPoolExecutor(48) as clients:
            statuses = Counter(clients.map(ask, range(96)))
        assert started.poll() is None
        assert set(statuses) == {200, 503}
        assert client.post("/classify", content=png(green())).status_code == 200

"""The run itself: Ray Data takes the parts through the stages, on this machine or on a cluster."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from service.bulk.places import BulkError, first_line
from service.bulk.stages import Plan, Runner, decode, write

GPU_BATCH = 256
"""Images that run together on a GPU."""
MAX_THREADS = 4
"""Of one engine on CPUs: beyond, a further engine gains more."""
ENGINE_SHARE = 0.75
"""Of a core that an engine's thread is counted as, so that decoding and writing find room beside it."""
KEEP_PROCESSES_MS = 60_000
"""Of idle ones, where Ray would end most after a second: a new one takes seconds to import what it needs."""


@dataclass(frozen=True, slots=True)
class Engines:
    """How many actors there may be, and what one gets."""

    device: str
    count: int
    threads: int
    cpus: float
    gpus: int
    task_cpus: float


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray of the cluster at `address`, or, without one, started here, for as long as the block runs.

    One that is started here has no dashboard, sends no statistics, and listens on the loopback interface only, to who
    knows a token that is drawn for it: whoever reaches a port of Ray may run code.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address is None:
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_idle_worker_killing_time_threshold_ms": str(KEEP_PROCESSES_MS),
        }
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            _stay_on_loopback()
            ray.init(address="local", include_dashboard=False, **quiet)
            _check_loopback()
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError) as error:
        raise BulkError(f"--address: there is no Ray cluster at {address}: {first_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _stay_on_loopback() -> None:
    """As Ray does by itself on macOS and Windows; elsewhere it would take the machine's own address."""
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


def _check_loopback() -> None:
    import ray

    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if not ipaddress.ip_address(address).is_loopback:
        raise RuntimeError(f"Ray listens on {address}, where others may reach it")


def choose_engines(device: str) -> Engines:
    """One engine for each GPU there is, or, on CPUs, one for every four of them. Raises BulkError without such."""
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if device == "cuda" and not gpus:
        raise BulkError("--device: it is cuda, but Ray sees no GPU")
    if device != "cpu" and gpus:
        return Engines("cuda", gpus, 1, cpus=0, gpus=1, task_cpus=1)
    threads = max(1, min(MAX_THREADS, cpus))
    task_cpus = min(1, (1 - ENGINE_SHARE) * cpus)
    return Engines("cpu", max(1, cpus // threads), threads, ENGINE_SHARE * threads, gpus=0, task_cpus=task_cpus)


def run_parts(plan: Plan, images: pa.Table, engines: Engines, batch_size: int | None) -> Iterator[tuple[int, int]]:
    """Do `images`; after each part how many it had, and how many of them failed. `batch_size`: if it was said.

    Raises what Ray raises where a stage fails; what was written by then stays.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if batch_size is None and engines.gpus:
        plan = replace(plan, batch_size=max(1, GPU_BATCH // plan.run.votes))
    ray.data.DataContext.get_current().enable_progress_bars = False
    tasks: dict[str, Any] = {"batch_size": None, "num_cpus": engines.task_cpus}
    size = plan.run.part_size
    blocks = [images.slice(start, size) for start in range(0, images.num_rows, size)]
    count = min(engines.count, len(blocks))
    dataset = (
        ray.data.from_arrow(blocks)
        .map_batches(partial(decode, plan=plan), batch_format="pyarrow", **tasks)
        .map_batches(
            Runner,
            fn_constructor_args=(plan, engines.device, engines.threads),
            batch_format="numpy",
            batch_size=None,
            num_cpus=engines.cpus,
            num_gpus=engines.gpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
        )
        .map_batches(partial(write, plan=plan), batch_format="numpy", **tasks)
    )
    for done in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        yield int(done["images"].sum()), int(done["failed"].sum())

"""Schemathesis asks every route of our OpenAPI everything that it can think of, with images from `fuzzing.py`.

For longer: `FUZZ_EXAMPLES=500 .venv/bin/python -m pytest tests/service/test_fuzzing.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.conftest import Server, running, until
from tests.service.fakes import FakeBundle

EXAMPLES = os.environ.get("FUZZ_EXAMPLES", "12")
"""Of each route, in each phase."""
ROUTES = ["/classify", "/classify/batch", "/purify", "/purify/batch", "/detect", "/v2/models/{name}/infer"]
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_nothing_that_the_documentation_allows_or_forbids_is_answered_otherwise() -> None:
    bundle = FakeBundle()
    bundle.misbehaves = False
    with running(bundle) as server:
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "tests/service/schemathesis.toml", "run"]
        options = ["--max-examples", EXAMPLES, "--seed", "1", "--generation-database", "none", "--no-color"]
        ended = subprocess.run([*command, url, *options], cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert server.still_answers()
        until(lambda: server.metric("clarifier_queue_depth") == 0)
        few = {route: count for route in ROUTES if (count := good_answers(server, route)) < 3}
        assert not few


def good_answers(server: Server, route: str) -> int:
    """How many there were: a fuzzer that only meets refusals has seen little."""
    samples = (sample for metric in server.gateway.metrics.registry.collect() for sample in metric.samples)
    wanted = {"route": route, "status": "200"}.items()
    total = (sample for sample in samples if sample.name == "clarifier_requests_total")
    return int(sum(sample.value for sample in total if wanted <= sample.labels.items()))

"""Rules, alerts and dashboards: as their tools read them, and asked of a real Prometheus that has seen real traffic."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring import own_prometheus
from monitoring.dashboards import DASHBOARDS, DIRECTORY, rendered
from monitoring.own_prometheus import CONFIGURATION, Prometheus
from service.metrics import Metrics
from tests.service import own_redis
from tests.service.conftest import until
from tests.service.fakes import png
from tests.service.watch.test_similarity import scene, square_attack
from tests.test_compose import COMPOSE, ROOT, Site, is_alive, is_up

RUNBOOK = ROOT / "docs" / "runbook.md"
NEEDS_PROMETHEUS = pytest.mark.skipif(not own_prometheus.is_installed(), reason=own_prometheus.MISSING)
CHOSEN = {"$instance": ".*", "$__rate_interval": "1m"}
"""What Grafana would put there."""
METRIC = re.compile(r"\b(clarifier[a-z0-9_:]+|up|process_[a-z_]+)(\{[^}]*\})?")


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((CONFIGURATION / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


RECORDED = rules("rules.yml")
ALERTS = rules("alerts.yml")
PANELS = [
    (f"{name}: {panel['title']}, {target['refId']}", target["expr"], target["legendFormat"])
    for name in DASHBOARDS
    for panel in json.loads((DIRECTORY / f"{name}.json").read_text())["panels"]
    for target in panel.get("targets", ())
]


SCALING = [
    (f"{scaled['metadata']['name']}: {trigger['name']}", trigger["metadata"]["query"])
    for scaled in yaml.safe_load_all((ROOT / "k8s/overlays/keda/scaledobjects.yaml").read_text())
    for trigger in scaled["spec"]["triggers"]
]


def promtool(*words: str) -> str:
    done = subprocess.run(["promtool", *words], cwd=CONFIGURATION, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@NEEDS_PROMETHEUS
def test_prometheus_takes_the_configuration_and_its_rules() -> None:
    assert f"{len(ALERTS)} rules found" in promtool("check", "config", "prometheus.yml")


@pytest.mark.slow
@NEEDS_PROMETHEUS
def test_each_alert_fires_on_its_own_series_and_is_silent_otherwise() -> None:
    promtool("test", "rules", "tests.yml")


def test_each_alert_is_tested_both_ways() -> None:
    tests = yaml.safe_load((CONFIGURATION / "tests.yml").read_text())["tests"]
    names = {alert["alert"] for alert in ALERTS}
    (quiet,) = (test for test in tests if test["name"] == "a quiet day")
    assert {case["alertname"] for case in quiet["alert_rule_test"]} == names
    assert not any("exp_alerts" in case for case in quiet["alert_rule_test"])
    assert {case["alertname"] for test in tests for case in test["alert_rule_test"] if "exp_alerts" in case} == names


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_each_alert_has_its_page_and_says_whom_it_wakes(alert: dict[str, Any]) -> None:
    place, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert ROOT / place == RUNBOOK
    assert anchor == alert["alert"].lower()
    assert f"\n## {alert['alert']}\n" in RUNBOOK.read_text()
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"]["summary"]


def test_the_runbook_has_no_page_of_an_alert_that_is_gone() -> None:
    pages = re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.M)
    assert pages == [alert["alert"] for alert in ALERTS]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_are_those_that_were_written_last(name: str) -> None:
    assert json.loads((DIRECTORY / f"{name}.json").read_text()) == rendered(DASHBOARDS[name])


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafana_knows_every_field_of_a_dashboard(name: str) -> None:
    """Grafana leaves out what it does not know, without a word: so do the types that it publishes."""
    register_default_plugins()
    written = json.loads((DIRECTORY / f"{name}.json").read_text())
    understood = json.loads(JSONEncoder().encode(Dashboard.from_json(written)))
    for annotation in written["annotations"]["list"]:
        del annotation["titleFormat"]  # of Prometheus' own plugin, whose annotations the types leave out
    assert list(left_out(written, understood)) == []


def left_out(written: Any, understood: Any, place: str = "") -> Iterator[str]:
    """Where `understood` lacks what is in `written`, or has something else."""
    if isinstance(written, dict) and isinstance(understood, dict):
        for key, value in written.items():
            yield from left_out(value, understood.get(key), f"{place}/{key}")
    elif isinstance(written, list) and isinstance(understood, list) and len(written) == len(understood):
        for number, (ours, theirs) in enumerate(zip(written, understood, strict=True)):
            yield from left_out(ours, theirs, f"{place}/{number}")
    elif written != understood:
        yield place


def test_what_grafana_does_not_know_is_seen() -> None:
    register_default_plugins()
    written = {"title": "a", "panels": [{"type": "timeseries", "title": "b", "options": {"legend": {"colour": "red"}}}]}
    understood = json.loads(JSONEncoder().encode(Dashboard.from_json(written)))
    assert list(left_out(written, understood)) == ["/panels/0/options/legend/colour"]


def test_dashboards_are_found_by_names_that_stay() -> None:
    uids = [dashboard.uid for dashboard in DASHBOARDS.values()]
    assert len(set(uids)) == len(uids)
    assert sorted(path.stem for path in DIRECTORY.glob("*.json")) == sorted(DASHBOARDS)


def test_grafana_is_told_of_the_source_and_the_folder_as_compose_mounts_them() -> None:
    provisioning = DIRECTORY.parent / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "clarifier.yaml").read_text())["providers"]
    assert source["url"] == "http://prometheus:9090"
    mounted = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["grafana"]["volumes"])
    assert mounted["./monitoring/grafana/dashboards"] == provider["options"]["path"]


def test_every_name_is_a_metric_of_ours_or_a_rule() -> None:
    page = Metrics().page().decode()
    known = set(re.findall(r"^# TYPE (\S+)", page, re.M)) | {rule["record"] for rule in RECORDED}
    known |= {f"{name}_{part}" for name in known for part in ("bucket", "sum", "count")} | {"up"}
    known |= {"clarifier_requests_in_progress"}  # of the application
    expressions = [rule["expr"] for rule in RECORDED + ALERTS] + [expr for _, expr, _ in PANELS]
    expressions += [query for _, query in SCALING]
    used = {name for expr in expressions for name, _ in METRIC.findall(expr) if not name.startswith("process_")}
    assert used <= known


# --- asked of a real one


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """The services of the compose file as processes, under traffic that goes on, clean and adversarial."""
    if not own_redis.is_installed() or not own_prometheus.is_installed():
        pytest.skip(f"{own_redis.MISSING}, or {own_prometheus.MISSING}")
    folder: Path = tmp_path_factory.mktemp("site")
    with ExitStack() as stack:
        site = Site.started(folder, stack)
        until(lambda: is_up(site.redis_port))
        _, port = site.start_ours("gateway")
        until(lambda: is_alive(port), 60)
        _, worker_port = site.start_ours("worker")
        until(lambda: site.is_healthy("worker", worker_port), 300)
        until(lambda: site.is_healthy("gateway", port), 60)
        targets = {"clarifier-gateway": [port], "clarifier-worker": [worker_port]}
        prometheus = stack.enter_context(own_prometheus.running(folder, targets))
        over = threading.Event()
        clients = [threading.Thread(target=client, args=(port, over)) for client in (_ask, _attack)]
        for thread in clients:
            thread.start()
        try:
            yield prometheus
        finally:
            over.set()
            for thread in clients:
                thread.join(60)


def _ask(port: int, over: threading.Event) -> None:
    """All kinds of requests, again and again."""
    cat = (ROOT / "examples/cat.jpg").read_bytes()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        for number in count():
            if over.is_set():
                return
            image = png(scene(1000 + number, 64))
            for query in ("defense=atop", "defense=none", "defense=atop&explain=true", "defense=aid"):
                client.post(f"/classify?{query}", content=image)
            client.post("/purify", content=cat)
            client.post("/detect", content=image)
            client.post("/classify", content=b"no image")
            client.get("/readyz")


def _attack(port: int, over: threading.Event) -> None:
    """One image, changed a little each time."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        for query in square_attack(scene(1), 100_000):
            if over.wait(0.05):
                return
            client.post("/classify?defense=none&explain=true", content=png(np.ascontiguousarray(query)))


def chosen(expr: str) -> str:
    for variable, value in CHOSEN.items():
        expr = expr.replace(variable, value)
    return expr


def answers(prometheus: Prometheus, expr: str) -> Callable[[], bool]:
    return lambda: bool(prometheus.ask(expr))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RECORDED, ids=[f"{rule['record']} {number}" for number, rule in enumerate(RECORDED)])
def test_each_rule_has_something_to_record(seen: Prometheus, rule: dict[str, Any]) -> None:
    until(answers(seen, rule["expr"]), 120)
    until(answers(seen, rule["record"]), 60)


@pytest.mark.slow
@pytest.mark.parametrize(("panel", "expr", "legend"), PANELS, ids=[panel for panel, _, _ in PANELS])
def test_each_panel_shows_something_under_its_legend(seen: Prometheus, panel: str, expr: str, legend: str) -> None:
    until(answers(seen, chosen(expr)), 120)
    wanted = set(re.findall(r"\{\{(\w+)\}\}", legend))
    for sample in seen.ask(chosen(expr)):
        assert wanted <= sample["metric"].keys(), panel
        assert sample["value"][1] != "NaN"


@pytest.mark.slow
@pytest.mark.parametrize(("trigger", "query"), SCALING, ids=[trigger for trigger, _ in SCALING])
def test_what_replicas_are_scaled_by_is_one_number(seen: Prometheus, trigger: str, query: str) -> None:
    until(answers(seen, query), 120)
    (sample,) = seen.ask(query)
    assert float(sample["value"][1]) >= 0, trigger


@pytest.mark.slow
@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_each_alert_watches_series_that_are_there(seen: Prometheus, alert: dict[str, Any]) -> None:
    for name, selector in METRIC.findall(alert["expr"]):
        matchers = selector.replace('status=~"5..", ', "")  # of which there are none, as there should be
        until(answers(seen, f"count({name}{matchers})"), 120)
    assert isinstance(seen.ask(alert["expr"]), list)


@pytest.mark.slow
def test_who_asks_again_and_again_is_an_alert_and_nothing_is_paged(seen: Prometheus) -> None:
    until(lambda: "ClarifierNearDuplicates" in seen.firing(), 120)
    pages = {alert["alert"] for alert in ALERTS if alert["labels"]["severity"] == "page"}
    assert not seen.firing() & pages


@pytest.mark.slow
def test_every_replica_is_scraped(seen: Prometheus) -> None:
    for job in ("clarifier-gateway", "clarifier-worker"):
        until(lambda: [sample["value"][1] for sample in seen.ask(f'up{{job="{job}"}}')] == ["1"])  # noqa: B023

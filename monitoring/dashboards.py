"""`python -m monitoring.dashboards`: writes `grafana/dashboards/*.json`, which Grafana reads.

A dashboard is a list of rows of panels, and a panel its title, its queries and what is particular about it. Change it
here, run `make monitoring`, and commit what it writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "grafana" / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${source}"}
GRID_WIDTH = 24
"""Of Grafana's pages."""
PANEL_HEIGHT = 8
SELECTED = 'instance=~"$instance"'
"""Series of the replicas that were chosen at the top."""


@dataclass(frozen=True)
class Query:
    """An expression of PromQL, and the legend of what it answers: `{{label}}` for a label's value."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """Of one kind of chart; `unit` as Grafana names it."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    text: str = ""
    """What it shows, for whoever hovers over its corner."""
    custom: dict[str, Any] = field(default_factory=dict)
    """How lines are drawn."""
    threshold: float | None = None
    """A line beyond which it is bad."""
    most: float | None = None
    """The top of the axis."""


@dataclass(frozen=True)
class Dashboard:
    """One page."""

    uid: str
    title: str
    text: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    """Titles, and panels from left to right."""


STACKED = {"fillOpacity": 40, "stacking": {"mode": "normal"}}
BASELINE = "baseline"


def rate(metric: str, by: str, selected: str = SELECTED) -> str:
    """What a counter rises by in a second."""
    return f"sum by ({by}) (rate({metric}{{{selected}}}[$__rate_interval]))"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """Of a histogram, over the replicas that were chosen; nothing where nothing happened."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', labels)}) >= 0"


def mean(histogram: str) -> str:
    """Of what a histogram has seen."""
    total, count = (f"sum(rate({histogram}_{part}{{{SELECTED}}}[$__rate_interval]))" for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


SERVICE = Dashboard(
    "clarifier-service",
    "Clarifier: Service",
    "Is everybody answered, how fast, and what is refused.",
    [
        (
            "Requests",
            [
                Panel(
                    "Requests by status",
                    [Query(rate("clarifier_requests_total", "status"), "{{status}}")],
                    unit="reqps",
                    custom=STACKED,
                ),
                Panel(
                    "Requests by route", [Query(rate("clarifier_requests_total", "route"), "{{route}}")], unit="reqps"
                ),
                Panel(
                    "Refused, by reason",
                    [Query(rate("clarifier_rejected_total", "reason"), "{{reason}}")],
                    unit="reqps",
                    text="Requests, and images of batches, that were refused or given up. Engines' failures are apart.",
                ),
            ],
        ),
        (
            "Errors",
            [
                Panel(
                    "Answered 5xx",
                    [
                        Query("clarifier:errors:ratio5m", "5 minutes"),
                        Query("clarifier:errors:ratio1h", "1 hour"),
                        Query("clarifier:errors:ratio6h", "6 hours"),
                    ],
                    unit="percentunit",
                    text="Of all requests but probes. At 1.44 % over an hour a month's budget (0.1 %) lasts two days.",
                    threshold=0.0144,
                ),
                Panel(
                    "Failures of engines",
                    [
                        Query(
                            "sum by (engine, kind) (increase(clarifier_engine_errors_total[$__rate_interval]))",
                            "{{engine}}: {{kind}}",
                        )
                    ],
                ),
                Panel(
                    "Ready",
                    [Query("sum by (job) (clarifier_ready)", "{{job}}")],
                    text="Replicas that are ready, of gateways and of workers.",
                ),
            ],
        ),
        (
            "How long it takes",
            [
                Panel(
                    "Latency of /classify",
                    [
                        Query('clarifier:request_duration_seconds:quantile5m{route="/classify"}', "p{{quantile}}"),
                    ],
                    unit="s",
                ),
                Panel(
                    "Latency by route, 95th percentile",
                    [Query(quantile(0.95, "clarifier_request_duration_seconds", "route"), "{{route}}")],
                    unit="s",
                ),
                Panel(
                    "Latency by stage, 95th percentile",
                    [Query('clarifier:stage_duration_seconds:quantile5m{quantile="0.95"}', "{{stage}}")],
                    unit="s",
                    text="Of a request in one stage; those of the engine are of the whole batch.",
                ),
                Panel(
                    "Latency by stage, median and 99th",
                    [
                        Query('clarifier:stage_duration_seconds:quantile5m{quantile="0.5"}', "{{stage}} p50"),
                        Query('clarifier:stage_duration_seconds:quantile5m{quantile="0.99"}', "{{stage}} p99"),
                    ],
                    unit="s",
                ),
            ],
        ),
        (
            "Saturation",
            [
                Panel(
                    "In progress",
                    [Query(f"sum by (route) (clarifier_requests_in_progress{{{SELECTED}}})", "{{route}}")],
                    custom=STACKED,
                ),
                Panel(
                    "Queue",
                    [
                        Query(f"sum(clarifier_queue_depth{{{SELECTED}}})", "waiting"),
                        Query(f"max(clarifier_queue_capacity{{{SELECTED}}})", "may wait"),
                        Query(f"max(clarifier_queue_lag{{{SELECTED}}})", "in Redis, taken by nobody"),
                    ],
                ),
                Panel(
                    "Wait",
                    [
                        Query("clarifier:queue_wait_seconds:p95_2m", "95th percentile"),
                        Query(f"max(clarifier_queue_oldest_seconds{{{SELECTED}}})", "the oldest now"),
                    ],
                    unit="s",
                    threshold=10,
                ),
                Panel(
                    "Event loops, 99th percentile of lag",
                    [Query(quantile(0.99, "clarifier_event_loop_lag_seconds", "instance"), "{{instance}}")],
                    unit="s",
                    text="What blocks an event loop keeps all its requests waiting.",
                ),
            ],
        ),
        (
            "Processes",
            [
                Panel(
                    "Memory",
                    [Query(f"process_resident_memory_bytes{{{SELECTED}}}", "{{job}} {{instance}}")],
                    unit="bytes",
                ),
                Panel(
                    "Processor",
                    [Query(f"rate(process_cpu_seconds_total{{{SELECTED}}}[$__rate_interval])", "{{job}} {{instance}}")],
                    text="Cores that are busy.",
                ),
                Panel(
                    "Body size",
                    [
                        Query(quantile(0.5, "clarifier_request_size_bytes"), "median"),
                        Query(quantile(0.99, "clarifier_request_size_bytes"), "99th percentile"),
                    ],
                    unit="bytes",
                ),
                Panel(
                    "Redis",
                    [
                        Query(f"min by (job) (clarifier_redis_up{{{SELECTED}}})", "{{job}}: is up"),
                        Query(rate("clarifier_redis_errors_total", "op"), "errors/s {{op}}"),
                    ],
                ),
            ],
        ),
    ],
)

BATCHES = Dashboard(
    "clarifier-batches",
    "Clarifier: Batches and device",
    "How well engines are used: what a batch holds, why it leaves, how long it runs.",
    [
        (
            "Batches",
            [
                Panel(
                    "Images a batch",
                    [Query(rate("clarifier_batch_size_bucket", "le"), "{{le}}")],
                    kind="heatmap",
                    text="More at once is cheaper for each, and slower for all.",
                ),
                Panel("Images a batch, mean", [Query(mean("clarifier_batch_size"), "images")]),
                Panel(
                    "Why they leave",
                    [Query(rate("clarifier_batches_total", "reason"), "{{reason}}")],
                    unit="ops",
                    custom=STACKED,
                    text="size: it was full. delay: its oldest image had waited long enough.",
                ),
            ],
        ),
        (
            "Engines",
            [
                Panel(
                    "Busy",
                    [
                        Query(
                            f"sum by (instance) (rate(clarifier_engine_seconds_total{{{SELECTED}}}[$__rate_interval]))",
                            "{{instance}}",
                        )
                    ],
                    unit="percentunit",
                    text="The share of time that an engine runs batches. At 100 % a queue grows.",
                    most=1,
                ),
                Panel(
                    "Images, by defense",
                    [Query(rate("clarifier_engine_images_total", "defense"), "{{defense}}")],
                    unit="ops",
                ),
                Panel(
                    "Device memory",
                    [Query(f"clarifier_device_memory_bytes{{{SELECTED}}}", "{{instance}}")],
                    unit="bytes",
                    text="Allocated on the accelerator; 0 on a CPU.",
                ),
            ],
        ),
        (
            "The queue before them",
            [
                Panel(
                    "Age of the oldest",
                    [Query(f"max by (instance) (clarifier_queue_oldest_seconds{{{SELECTED}}})", "{{instance}}")],
                    unit="s",
                ),
                Panel(
                    "Waited",
                    [Query(rate("clarifier_queue_wait_seconds_bucket", "le"), "{{le}}")],
                    kind="heatmap",
                    unit="s",
                ),
                Panel(
                    "Taken by nobody",
                    [Query(f"max(clarifier_queue_lag{{{SELECTED}}})", "images in Redis")],
                    text="What autoscaling follows: images that no worker has taken.",
                ),
            ],
        ),
        (
            "Bundles",
            [
                Panel(
                    "Bundles that are served",
                    [
                        Query(
                            "count by (model, digest, device) (clarifier_model_info)", "{{model}} {{digest}} {{device}}"
                        )
                    ],
                    text="Replicas, by what they serve. Two digests of one model: they disagree.",
                ),
                Panel("Time of the last load", [Query("clarifier_bundle_load_seconds", "{{instance}}")], unit="s"),
            ],
        ),
    ],
)

ATTACK_WATCH = Dashboard(
    "clarifier-attack-watch",
    "Clarifier: Attack watch",
    "What traffic says about attacks. Scores and flips are of images whose client asked for them, and of a sample of "
    "the others: CLARIFIER_SHADOW_RATE.",
    [
        (
            "Scores",
            [
                Panel(
                    "AID score",
                    [Query(rate("clarifier_aid_score_bucket", "le", ""), "{{le}}")],
                    kind="heatmap",
                    text="1 natural, 0 adversarial.",
                ),
                Panel(
                    "Suspicious",
                    [
                        Query("clarifier:suspicious:ratio", "in {{window}}"),
                        Query("clarifier:suspicious:baseline1d", "in {{window}}, " + BASELINE),
                        Query(
                            "clarifier:suspicious:baseline1d + 4 * clarifier:suspicious:sigma1d", "in {{window}}, alert"
                        ),
                    ],
                    unit="percentunit",
                    text="The share of scored images below their bundle's threshold, and where the alert begins.",
                ),
                Panel(
                    "How far the scores are from their baseline",
                    [Query("clarifier:aid_score:psi", "stability index")],
                    text="0.1 is a small change, 0.25 a large one.",
                    threshold=0.25,
                ),
            ],
        ),
        (
            "What defenses change",
            [
                Panel(
                    "Labels that the defense turns",
                    [
                        Query("clarifier:flips:ratio2m", "{{model}} {{defense}}"),
                        Query("clarifier:flips:baseline1d", "{{model}} {{defense}}, " + BASELINE),
                    ],
                    unit="percentunit",
                    text="The share of images whose defended and undefended labels differ.",
                ),
                Panel(
                    "How far purification moves images",
                    [
                        Query(quantile(0.5, "clarifier_purification_linf", "defense"), "{{defense}}, median"),
                        Query(quantile(0.95, "clarifier_purification_linf", "defense"), "{{defense}}, 95th percentile"),
                    ],
                    text="L-infinity distance, in [0, 1].",
                    most=1,
                ),
                Panel(
                    "The sample",
                    [
                        Query(rate("clarifier_shadowed_total", "outcome"), "{{outcome}}"),
                        Query("sum(rate(clarifier_aid_score_count[$__rate_interval]))", "scored, with those explained"),
                    ],
                    unit="ops",
                ),
            ],
        ),
        (
            "Verdicts",
            [
                Panel(
                    "Labels",
                    [Query("clarifier:predictions:share10m", "{{model}} {{label}}")],
                    unit="percentunit",
                    custom=STACKED,
                    most=1,
                ),
                Panel(
                    "Labels, against their baseline",
                    [
                        Query(
                            "clarifier:predictions:share10m - clarifier:predictions:baseline1d",
                            "{{model}} {{label}}",
                        )
                    ],
                    unit="percentunit",
                    text="An attack that wants one answer shows as a label that rises.",
                ),
                Panel(
                    "Verdicts by defense",
                    [
                        Query(
                            rate("clarifier_requests_total", "defense", f'{SELECTED}, status="200", defense!=""'),
                            "{{defense}}",
                        )
                    ],
                    unit="reqps",
                ),
            ],
        ),
        (
            "Queries that resemble each other",
            [
                Panel(
                    "Near-duplicates, by key",
                    [Query(rate("clarifier_near_duplicates_total", "key"), "{{key}}")],
                    unit="ops",
                    text="Images that are nearly an earlier one of the same key or address. Without keys: one line.",
                ),
                Panel(
                    "Beyond the limit",
                    [Query("sum(increase(clarifier_query_similarity_alerts_total[2m]))", "in two minutes")],
                    threshold=20,
                ),
                Panel(
                    "Not compared",
                    [Query("sum(rate(clarifier_similarity_skipped_total[$__rate_interval]))", "images")],
                    unit="ops",
                    text="More came than could be looked at.",
                ),
            ],
        ),
    ],
)

COST = Dashboard(
    "clarifier-cost",
    "Clarifier: Cost of defense",
    "What it costs to defend, as a multiple of an undefended answer, from classifications without explain and votes.",
    [
        (
            "A defense's price",
            [
                Panel(
                    "Times an undefended answer",
                    [Query("clarifier:defense_cost:multiple5m", "{{defense}}")],
                    text="1 is free. Each bundle's report says what was measured offline.",
                ),
                Panel(
                    "Engine time an image",
                    [
                        Query(
                            f"{rate('clarifier_engine_seconds_total', 'defense')}"
                            f" / ({rate('clarifier_engine_images_total', 'defense')} > 0)",
                            "{{defense}}",
                        )
                    ],
                    unit="s",
                    text="Of all that ran with this defense, explained or not.",
                ),
            ],
        ),
        (
            "Who takes the engines' time",
            [
                Panel(
                    "By defense",
                    [Query(rate("clarifier_engine_seconds_total", "defense"), "{{defense}}")],
                    unit="percentunit",
                    custom=STACKED,
                    text="The share of an engine. The sample of the attack watch is under none.",
                ),
                Panel(
                    "Defense and classifier",
                    [Query(rate("clarifier_cost_seconds_total", "part"), "{{part}}")],
                    unit="percentunit",
                    custom=STACKED,
                ),
                Panel(
                    "By stage, mean",
                    [
                        Query(
                            f"{rate('clarifier_stage_duration_seconds_sum', 'stage')}"
                            f" / ({rate('clarifier_stage_duration_seconds_count', 'stage')} > 0)",
                            "{{stage}}",
                        )
                    ],
                    unit="s",
                ),
            ],
        ),
        (
            "What is saved",
            [
                Panel(
                    "Cheap chains in place of strong ones",
                    [Query(rate("clarifier_auto_degraded_total", "model"), "{{model}}")],
                    unit="ops",
                    text="Images that `auto` would have given its strong chain, beyond CLARIFIER_AUTO_STRONG_PER_S.",
                ),
                Panel(
                    "Answer cache",
                    [Query(rate("clarifier_cache_requests_total", "result"), "{{result}}")],
                    unit="ops",
                ),
            ],
        ),
    ],
)

DASHBOARDS = {"service": SERVICE, "batches": BATCHES, "attack-watch": ATTACK_WATCH, "cost": COST}
"""By the names of their files."""


def rendered(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana reads it."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.text,
        "tags": ["clarifier"],
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {"type": "dashboards", "tags": ["clarifier"], "title": "Clarifier", "asDropdown": True, "keepTime": True}
        ],
        "annotations": {"list": [_alerts()]},
        "templating": {"list": [_source(), _instances()]},
        "panels": list(_panels(dashboard)),
    }


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "expr": 'ALERTS{alertname=~"Clarifier.*", alertstate="firing"}',
        "iconColor": "red",
        "titleFormat": "{{alertname}}",
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 0}


def _instances() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "Replica",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(clarifier_ready, instance)", "refId": "instances"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for title, panels in dashboard.rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": GRID_WIDTH, "h": 1},
            "panels": [],
        }
        width = GRID_WIDTH // len(panels)
        for place, panel in enumerate(panels):
            number += 1
            position = {"x": place * width, "y": top + 1, "w": width, "h": PANEL_HEIGHT}
            yield {"id": number, "gridPos": position, **_panel(panel)}
        top += 1 + PANEL_HEIGHT


def _panel(panel: Panel) -> dict[str, Any]:
    is_heatmap = panel.kind == "heatmap"
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "range": True,
            **({"format": "heatmap"} if is_heatmap else {}),
        }
        for number, query in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "targets": targets,
        **(_heatmap(panel) if is_heatmap else _lines(panel)),
    }


def _lines(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    custom = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": 60_000, **panel.custom}
    if panel.threshold is not None:
        steps.append({"color": "red", "value": panel.threshold})
        custom["thresholdsStyle"] = {"mode": "dashed"}
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "custom": custom,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.most is not None:
        defaults |= {"min": 0, "max": panel.most}
    return {
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _heatmap(panel: Panel) -> dict[str, Any]:
    return {
        "fieldConfig": {"defaults": {"custom": {"scaleDistribution": {"type": "linear"}}}, "overrides": []},
        "options": {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "fill": "dark-orange"},
            "rowsFrame": {"layout": "auto"},
            "tooltip": {"mode": "single", "yHistogram": True},
            "yAxis": {"axisPlacement": "left", "unit": panel.unit},
        },
    }


def main() -> None:
    """Write every dashboard."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, dashboard in DASHBOARDS.items():
        (DIRECTORY / f"{name}.json").write_text(json.dumps(rendered(dashboard), indent=2) + "\n")


if __name__ == "__main__":
    main()

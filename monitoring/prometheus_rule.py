"""`python -m monitoring.prometheus_rule`: writes the rules and alerts as the Prometheus operator reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RULES = ("rules.yml", "alerts.yml")
WRITTEN = HERE.parent / "k8s" / "components" / "monitoring" / "rules.yaml"


def prometheus_rule() -> dict[str, Any]:
    """The rules of `prometheus/`, as one object of Kubernetes."""
    groups = [group for name in RULES for group in yaml.safe_load((HERE / "prometheus" / name).read_text())["groups"]]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "clarifier"},
        "spec": {"groups": groups},
    }


def main() -> None:
    """Write it."""
    WRITTEN.write_text(
        "# Written by `make monitoring` from monitoring/prometheus.\n" + yaml.safe_dump(prometheus_rule())
    )


if __name__ == "__main__":
    main()

"""A report as one HTML page that needs nothing else: tables, curves, histograms and pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from training.pictures import Picture

TEMPLATE = "report.html.jinja"
BINS = 40


def page(
    report: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]], scores: Mapping[str, Sequence[float]]
) -> str:
    """The page. `pictures` has those of each defense, `scores` the AID scores of clean and of attacked images."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda cell: f"{100 * cell['accuracy']:.1f}"
    environment.filters["interval"] = lambda cell: "{:.1f} to {:.1f}".format(*(100 * end for end in cell["interval"]))
    rows = {"undefended": report["undefended"], **report["defenses"]}
    return environment.get_template(TEMPLATE).render(
        report=report,
        rows=rows,
        attacks=attacks(rows),
        pictures=pictures,
        curves={axis: curve(rows, axis) for axis in ("eps", "steps")},
        histogram=histogram(scores, report["detection"]["threshold"]) if scores else "",
    )


def attacks(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Every attack that some row has, with its level, level by level."""
    groups = [row[group] for row in rows.values() for group in ("grey_box", "adaptive", "unseen")]
    found = {name: str(cell["level"]) for group in groups for name, cell in group.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def curve(rows: Mapping[str, Mapping[str, Any]], axis: str) -> str:
    """Accuracy against `axis` for every row that has the curve, with intervals, as SVG; empty where none has."""
    drawn = {name: row["curves"][axis] for name, row in rows.items() if row["curves"].get(axis)}
    if not drawn:
        return ""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, points in drawn.items():
        values = [255 * point["eps"] if axis == "eps" else point["steps"] for point in points]
        accuracies = [100 * point["accuracy"] for point in points]
        low, high = zip(*([100 * end for end in point["interval"]] for point in points), strict=True)
        (line,) = axes.plot(values, accuracies, marker="o", label=name)
        axes.fill_between(values, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xlabel("budget of the attack, in 255ths" if axis == "eps" else "steps of the attack")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    if axis == "steps":
        axes.set_xscale("log")
    axes.legend()
    return svg(figure)


def histogram(scores: Mapping[str, Sequence[float]], threshold: float) -> str:
    """AID scores of clean and attacked images, with the threshold, as SVG."""
    figure = Figure(figsize=(6, 3.0), layout="constrained")
    axes = figure.subplots()
    for name, values in scores.items():
        axes.hist(values, bins=BINS, range=(0, 1), alpha=0.5, label=name, density=True)
    axes.axvline(threshold, color="black", linestyle="--", label="threshold")
    axes.set_xlabel("AID score: 1 natural, 0 adversarial")
    axes.set_ylabel("density")
    axes.legend()
    return svg(figure)


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "clarifier", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]

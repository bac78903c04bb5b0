"""A report as it is read: a table on the terminal, a gate, and one HTML page that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from training.glossary import what_it_does
from training.pictures import Picture

TEMPLATE = "report.html.jinja"
BINS = 40
AXES = {
    "eps": "budget of the attack, in 255ths",
    "steps": "steps of the attack",
    "draws": "draws that the gradient is the mean of",
}
"""What curves are drawn against."""


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
    rows = {"undefended": report["undefended"], **report["defenses"], **report["grey_box_only"]}
    return environment.get_template(TEMPLATE).render(
        report=report,
        rows=rows,
        attacks=attacks(rows),
        what_it_does=what_it_does,
        upside_down={name: found for name, row in rows.items() if (found := better_attacked(row))},
        pictures=pictures,
        curves={axis: curve(rows, axis) for axis in AXES},
        histogram=histogram(scores, report["detection"]["threshold"]) if scores else "",
    )


def attacks(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Every attack that some row has, with its level, level by level."""
    groups = [row[group] for row in rows.values() for group in ("grey_box", "adaptive", "unseen")]
    found = {name: str(cell["level"]) for group in groups for name, cell in group.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def better_attacked(row: Mapping[str, Any]) -> str:
    """The grey-box attack whose images are read better than clean ones, their intervals apart; "" for none."""
    best = max(row["grey_box"], key=lambda name: float(row["grey_box"][name]["accuracy"]), default="")
    return best if best and row["grey_box"][best]["interval"][0] > row["standard"]["interval"][1] else ""


def curve(rows: Mapping[str, Mapping[str, Any]], axis: str) -> str:
    """Accuracy against `axis` for every row that has the curve, with intervals, as SVG; empty where none has."""
    drawn = {name: row["curves"][axis] for name, row in rows.items() if row["curves"].get(axis)}
    if not drawn:
        return ""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, points in drawn.items():
        values = [255 * point["eps"] if axis == "eps" else point[axis] for point in points]
        accuracies = [100 * point["accuracy"] for point in points]
        low, high = zip(*([100 * end for end in point["interval"]] for point in points), strict=True)
        (line,) = axes.plot(values, accuracies, marker="o", label=name)
        axes.fill_between(values, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    if axis != "eps":
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


# --- on the terminal


def table(report: Mapping[str, Any]) -> str:
    """The report as the table that is printed on the terminal."""
    rows = [("undefended", report["undefended"]), *report["defenses"].items(), *report["grey_box_only"].items()]
    attacks = list(report["undefended"]["grey_box"])
    names = ["standard", *attacks, "worst case"]
    lines = [f"{'defense':<18}" + "".join(f"{name:>26}" for name in names) + f"{'cost':>9}  credible"]
    for name, row in rows:
        cells = [row["standard"], *(row["grey_box"].get(attack) for attack in attacks), row["worst_case"]]
        credible = "yes" if row["credible"] else "NO"
        lines.append(f"{name:<18}" + "".join(f"{_cell(c):>26}" for c in cells) + f"{row['cost']:>8.1f}x  {credible}")
    lines.append("")
    for name, row in rows:
        adaptive = sorted(row["adaptive"].items(), key=lambda item: item[1]["accuracy"])
        found = (f"{attack} {100 * cell['accuracy']:.1f}" for attack, cell in adaptive)
        lines.append(f"{name}: {', '.join(found)}")
        if against := row.get("against_static"):
            better, worse, p = (against[what] for what in ("better", "worse", "p_value"))
            difference = f"{100 * against['difference']:+.1f}, {better} images better and {worse} worse, p {p:.2g}"
            lines.append(f"  its worst case against that of the undefended: {difference}")
        lines += [f"  not credible: {reason}" for reason in row["reasons"]]
    if "detection" in report:
        scores = (f"{name} {values['auroc']:.4f}" for name, values in report["detection"]["attacks"].items())
        lines.append(f"AID score, AUROC clean against attacked: {', '.join(scores)}")
    lines.append("Grey-box accuracies are no evidence of robustness: their attacker does not know the defense.")
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    low, high = cell["interval"]
    return f"{100 * cell['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f}, {cell['n']})"


def below(report: Mapping[str, Any], wanted: float) -> list[str]:
    """A line for every defense whose worst case is below `wanted`, not credible, or asked for and not measured.

    Those in `grey_box_only` were not meant to have one; but where no defense has, that is a line too.
    """
    meant = report["recipe"]["grey_box_only"]
    lines = [f"{name}: no attack that knows it was run" for name in report["grey_box_only"] if name not in meant]
    if not report["defenses"] and not lines:
        lines.append("no defense has a worst case in this report")
    for name, row in report["defenses"].items():
        accuracy = row["worst_case"]["accuracy"]
        if accuracy < wanted:
            lines.append(f"{name}: the worst case is {accuracy:.4f}, below {wanted:g}")
        if not row["credible"]:
            lines.append(f"{name}: not credible: {'; '.join(row['reasons'])}")
    return lines

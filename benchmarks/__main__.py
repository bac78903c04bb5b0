"""`python -m benchmarks [NAME ...]`: run the benchmarks and keep their figures in `benchmarks/results/`."""

from __future__ import annotations

import argparse
import json
from datetime import date
from importlib import import_module
from pathlib import Path

from training.provenance import git_commit, hardware, library_versions

BENCHMARKS = ("zeropur", "throughput", "overload", "workers", "jobs", "peers", "chaos", "rolling", "soak", "rehearsal")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run all benchmarks, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(BENCHMARKS)}")
    names = parser.parse_args().names or BENCHMARKS
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}")
    for name in names:
        figures = import_module(f"benchmarks.{name}").run()
        result = {"machine": hardware(), "versions": library_versions(), "git_commit": git_commit(), name: figures}
        path = RESULTS / f"{date.today():%Y-%m-%d}-{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"figures kept in {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()

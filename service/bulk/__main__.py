"""`python -m service.bulk SOURCE TARGET`: arguments, progress, a summary, and an exit status."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING

from service.loading import ENGINE_DIED, MISCONFIGURED

if TYPE_CHECKING:
    from service.bulk.plans import Work
    from service.settings import Settings

FAILED_IMAGES = 1
"""What a strict run exits with if images failed."""
MISSING = "python -m service.bulk needs Ray Data: pip install 'clarifier[service,bulk]'"
DESCRIPTION = """\
Classify or purify many images with Ray Data, as the service would.

SOURCE is a folder (all of it: .jpg, .jpeg, .png, .webp, .bmp), a parquet file or a folder of them, or a single image: a
path, or a URI that pyarrow reads (s3://, gs://, file://).
TARGET becomes a folder of results/part-*.parquet, a row for each image, and, where a folder is purified, images/.

An image that cannot be answered fails alone: its row has the service's code for the problem in the column `error`.
A run that was stopped goes on where it was when the same command is given again; images that have come to the source
since are done then too. One run at a time for each TARGET.
"""
EPILOG = """\
exit status: 0 all done, 1 images failed (--strict), 2 wrong arguments, 70 the run failed and can be gone on with,
130 or 143 after SIGINT or SIGTERM, likewise

  python -m service.bulk photos/ labels/ --defense atop --seed 1
  python -m service.bulk test.parquet purified/ --operation purify --column img
  python -m service.bulk s3://bucket/photos s3://bucket/labels --address auto
"""
SAY_AGAIN_S = 1.0
"""Between two lines of progress, at least."""


class Stopped(BaseException):
    """A signal asks the run to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="python -m service.bulk",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("source", metavar="SOURCE", help="what to read: folder, parquet, image; path or URI")
    made.add_argument("target", metavar="TARGET", help="folder to write to: path or URI; new, or of a stopped run")
    made.add_argument("--operation", choices=["classify", "purify"], default="classify", help="(default: %(default)s)")
    made.add_argument(
        "--model",
        metavar="NAME",
        help="bundle, `name` (newest version) or `name@version` (default: CLARIFIER_DEFAULT_MODEL, or cifar10)",
    )
    made.add_argument("--defense", metavar="CHAIN", help="none, or a chain such as atop:rt3,aid (default: the model's)")
    made.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of random defenses: each image's own seed follows from it "
        "and the image's path and row (default: drawn once for a TARGET)",
    )
    made.add_argument("--votes", type=int, metavar="N", help="random draws to average (default: 1)")
    made.add_argument("--top-k", type=int, metavar="N", help="classes to list (default: 5, or all)")
    made.add_argument(
        "--column", metavar="NAME", help="of parquet: bytes, or a struct with `bytes` (default: the only such column)"
    )
    made.add_argument(
        "--batch-size",
        type=_count,
        metavar="N",
        help="images that run together (default: CLARIFIER_MAX_BATCH_SIZE, or 32; on GPUs 256)",
    )
    made.add_argument(
        "--repository",
        metavar="DIR",
        help="of bundles, at the same path on every machine (default: CLARIFIER_MODEL_REPOSITORY, or models/bundles)",
    )
    made.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="one engine runs on each GPU, or on every four CPUs (default: GPUs if there are any)",
    )
    made.add_argument(
        "--address",
        metavar="ADDRESS",
        help="of a Ray cluster, `auto` for the one on this machine "
        "(default: a Ray of its own, which nobody else can reach)",
    )
    made.add_argument("--strict", action="store_true", help="exit with 1 if any image of TARGET failed")
    return made


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is asked; the exit status."""
    given = parser().parse_args(arguments)
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        return _refuse(MISSING)
    from service.bulk.places import BulkError
    from service.settings import SettingsError, load_settings

    try:
        return _run(given, load_settings())
    except (BulkError, SettingsError) as error:
        return _refuse(str(error))
    except (Stopped, KeyboardInterrupt) as stopped:
        _say("stopped; the same command goes on from here")
        return 128 + (stopped.number if isinstance(stopped, Stopped) else signal.SIGINT)


def _heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _refuse(why: str) -> int:
    _say(why)
    return MISCONFIGURED


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(given: argparse.Namespace, settings: Settings) -> int:
    from service.bulk.plans import make_plan

    work = make_plan(given, settings)
    _announce(work)
    started = time.monotonic()
    progress = Progress(work.left.num_rows)
    if work.left.num_rows:
        try:
            _work_off(given, work, progress)
        except Exception as error:
            return _report_failure(error)
    _sum_up(given, work, progress, time.monotonic() - started)
    return FAILED_IMAGES if given.strict and work.failed + progress.failed else 0


def _work_off(given: argparse.Namespace, work: Work, progress: Progress) -> None:
    from service.bulk.cluster import choose_engines, connected, run_parts

    with connected(given.address):
        _heed_signals()  # Ray has its own way with them
        engines = choose_engines(given.device)
        _say(f"{engines.count} engine(s) on {engines.device}")
        for images, failed in run_parts(work.plan, work.left, engines, batch_size=given.batch_size):
            progress.add(images, failed)


def _report_failure(error: Exception) -> int:
    """Raises BulkError again: that is a wrong argument."""
    from service.bulk.places import BulkError

    if isinstance(error, BulkError):
        raise error
    last = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    _say(f"the run failed: {last[-1].strip()}\nwhat is done stays; the same command goes on from there")
    return ENGINE_DIED


def _announce(work: Work) -> None:
    run = work.plan.run
    seed = f", seed {run.seed}" if work.plan.draws else ""
    _say(f"{run.operation} with {run.model} and {run.defense}{seed}: {work.left.num_rows} images")
    if work.left_out:
        _say(f"{work.left_out} files of other kinds are left out")
    if work.begun:
        _say(f"an earlier run has done {work.done} images: only what is missing is done")


class Progress:
    """Counts what is done, and says so, at most once a second."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.failed = total, 0, 0
        self._said = 0.0
        self._first: tuple[float, int] | None = None

    def add(self, images: int, failed: int) -> None:
        """A part is done."""
        now = time.monotonic()
        self.done, self.failed = self.done + images, self.failed + failed
        if self._first is None:
            self._first = now, self.done
        if now >= self._said + SAY_AGAIN_S or self.done == self.total:
            self._said = now
            _say(f"{self.done} of {self.total} images, {self.failed} failed{self._left(now)}")

    def _left(self, now: float) -> str:
        """How long it may take, by the parts after the first, which had to wait for the engines."""
        since, before = self._first or (now, self.done)
        if now <= since or self.done == self.total:
            return ""
        rate = (self.done - before) / (now - since)
        return f", {rate:.1f} images/s, {(self.total - self.done) / rate:.0f} s left" if rate else ""


def _sum_up(given: argparse.Namespace, work: Work, progress: Progress, seconds: float) -> None:
    rate = progress.done / seconds if seconds else 0.0
    print(
        f"images    {work.done + progress.done} in {given.target}\n"
        f"resumed   {work.done} of them were there from earlier runs\n"
        f"failed    {work.failed + progress.failed}\n"
        f"seconds   {seconds:.1f}\n"
        f"images/s  {rate:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

"""Clarifier against each peer: all of them started, one measured at a time while the others are held, round by round.

First every peer is tried with each of its settings, and runs with the faster one from then on.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.peers.load import CLIENTS
from benchmarks.peers.systems import CLARIFIER, PEERS, RATE_LIMIT, ROOT, Settings, Started, System, started
from benchmarks.peers.tiny import CLASSES, MFLOP, expected, export, photos, tiny_bundle

ROUNDS = 5
WARM_S, ROUND_S = 1.0, 4.0
TRIAL_WARM_S, TRIAL_S = 3.0, 3.0
START_S = 180.0
WANTED_RATIO = 1.15
TOLERANCE = 1e-3
"""Of a probability, against the bundle's own."""
INSTALL = ROOT / "scripts" / "peers"
PINS = Path(__file__).parent / "requirements"

Answers = Sequence[tuple[bytes, str, float]]
"""Photographs, and the label and probability that each has."""


class Wrong(RuntimeError):
    """A system that cannot be measured; the message is one sentence."""


def race() -> dict[str, object]:
    """Measure, print, and return the figures."""
    with TemporaryDirectory(prefix="peers-") as name, ExitStack() as stack:
        folder = Path(name)
        answers = _prepare(folder / "model")
        running = [_start(stack, CLARIFIER, folder, {}, answers)]
        trials = dict[str, list[dict[str, object]]]()
        left_out = dict[str, str]()
        for peer in PEERS:
            try:
                _install(peer.name)
                trials[peer.name] = _try(peer, folder, answers)
                running.append(_start(stack, peer, folder, _fastest(trials[peer.name]), answers))
            except Wrong as why:
                left_out[peer.name] = str(why)
                print(f"{peer.name} is left out: {why}")
        echo_per_s = _echo(answers[0][0])
        rounds = _rounds(running, left_out, answers[0][0])
        resident_mb = {run.system.name: run.resident_mb() for run in running}
    figures = _figures(rounds) | {
        "left_out": left_out,
        "resident_mb": resident_mb,
        "echo_per_s": echo_per_s,
        "trials": trials,
        "peer_versions": {name: _version(name) for name in trials},
        "clients": CLIENTS,
        "photo_bytes": len(answers[0][0]),
        "network_mflop": MFLOP,
        "clarifier_settings": f"defaults, an API key, RATE_LIMIT={RATE_LIMIT}",
    }
    _print(figures)
    return figures


# --- before the race


def _prepare(model: Path) -> Answers:
    bundle = tiny_bundle()
    export(bundle, model)
    answers = list[tuple[bytes, str, float]]()
    for photo in photos():
        probability, index = expected(bundle, photo).max(0)
        answers.append((photo, CLASSES[int(index)], float(probability)))
    return answers


def _install(name: str) -> None:
    """The environment of a peer. Raises Wrong."""
    if name == "torchserve" and shutil.which("java") is None:
        raise Wrong("there is no java")
    result = subprocess.run([str(INSTALL), name], capture_output=True, text=True, check=False)
    if result.returncode:
        raise Wrong(f"it cannot be installed: {(result.stderr.strip() or 'no reason given').splitlines()[-1]}")


def _start(stack: ExitStack, system: System, folder: Path, choice: Settings, answers: Answers) -> Started:
    """A system that has been seen to answer right, and is held. Raises Wrong."""
    run = stack.enter_context(started(system, folder / "model", folder / system.name, choice))
    _await_answers(run, folder / system.name / "log", answers)
    run.hold()
    return run


def _await_answers(run: Started, log: Path, answers: Answers) -> None:
    """Wait for a first answer, then compare one for each photograph. Raises Wrong."""
    ends = time.monotonic() + START_S
    while _ask(run, answers[0][0]) is None:
        if run.process.poll() is not None or time.monotonic() > ends:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise Wrong(f"it does not answer; the last line of its log: {''.join(last)}")
        time.sleep(0.2)
    for photo, label, probability in answers:
        answer = _ask(run, photo)
        found = None if answer is None else (answer["label"], answer["probability"])
        if found is None or found[0] != label or abs(float(str(found[1])) - probability) > TOLERANCE:
            raise Wrong(f"it answers {found}, not {(label, probability)}")


def _ask(run: Started, photo: bytes) -> Mapping[str, object] | None:
    """The answer to one request; None while there is none that is 200."""
    try:
        with socket.create_connection(("127.0.0.1", run.port), timeout=30) as connection:
            connection.sendall(run.system.request(photo))
            response = http.client.HTTPResponse(connection)
            response.begin()
            body = response.read()
    except (OSError, http.client.HTTPException):
        return None
    if response.status != 200:
        return None
    answer = json.loads(body)
    return dict(answer[0] if isinstance(answer, list) else answer)


def _try(peer: System, folder: Path, answers: Answers) -> list[dict[str, object]]:
    """Requests per second with each choice of settings. Raises Wrong."""
    tried = list[dict[str, object]]()
    for choice in peer.choices:
        with ExitStack() as stack:
            run = _start(stack, peer, folder, choice, answers)
            tried.append({**choice, "per_s": _load(run, answers[0][0], TRIAL_WARM_S, TRIAL_S)["per_s"]})
    return tried


def _fastest(tried: Sequence[Mapping[str, object]]) -> Settings:
    best = max(tried, key=lambda trial: float(str(trial["per_s"])))
    return {name: str(value) for name, value in best.items() if name != "per_s"}


# --- the race


def _rounds(running: list[Started], left_out: dict[str, str], photo: bytes) -> list[dict[str, dict[str, float]]]:
    """Every system once a round; who comes first changes from round to round. A peer that fails is left out of all."""
    rounds = [dict[str, dict[str, float]]() for _ in range(ROUNDS)]
    for number, found in enumerate(rounds):
        first = number % len(running)
        for run in [*running[first:], *running[:first]]:
            try:
                found[run.system.name] = _load(run, photo, WARM_S, ROUND_S)
            except Wrong as why:
                if run.system is CLARIFIER:
                    raise
                left_out[run.system.name] = str(why)
                print(f"{run.system.name} is left out: {why}")
                running.remove(run)
    names = [run.system.name for run in running]
    return [{name: found[name] for name in names} for found in rounds]


def _load(run: Started, photo: bytes, warm_s: float, seconds: float) -> dict[str, float]:
    run.go_on()
    try:
        return _generate(run.port, run.system.request(photo), warm_s, seconds)
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Wrong(f"{run.system.name} failed under load: {''.join(last)}") from None
    finally:
        run.hold()


def _generate(port: int, request: bytes, warm_s: float, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.peers.load", str(port), str(warm_s), str(seconds)]
    result = subprocess.run(command, input=request, capture_output=True, check=True)
    return dict(json.loads(result.stdout))


def _echo(photo: bytes) -> float:
    """What the clients can do: requests per second against a server that does nothing."""
    command = [sys.executable, "-m", "benchmarks.peers.load", "echo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            return _generate(port, CLARIFIER.request(photo), WARM_S, ROUND_S)["per_s"]
        finally:
            process.terminate()


# --- figures


def _figures(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, object]:
    names = list(rounds[0])
    ratios = {
        name: [each["clarifier"]["per_s"] / each[name]["per_s"] for each in rounds]
        for name in names
        if name != "clarifier"
    }
    return {
        "throughput": {name: statistics.median(each[name]["per_s"] for each in rounds) for name in names},
        "ratio": {name: _spread(found) for name, found in ratios.items()},
        "wanted_ratio": WANTED_RATIO,
        "p50_ms": {name: statistics.median(each[name]["p50_ms"] for each in rounds) for name in names},
        "p99_ms": {name: statistics.median(each[name]["p99_ms"] for each in rounds) for name in names},
        "rounds": list(rounds),
    }


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def _version(name: str) -> str:
    package = f"{name}=="
    pins = (PINS / f"{name}.txt").read_text().splitlines()
    return next(line.removeprefix(package).split()[0] for line in pins if line.startswith(package))


def _print(figures: Mapping[str, object]) -> None:
    throughput, ratio, resident, p50, p99 = (
        dict(figures[name])  # type: ignore[call-overload]
        for name in ("throughput", "ratio", "resident_mb", "p50_ms", "p99_ms")
    )
    print(
        f"{CLIENTS} clients in a closed loop, a JPEG of {figures['photo_bytes']} bytes, a network of {MFLOP} MFLOP, "
        f"{ROUNDS} rounds; the clients reach {figures['echo_per_s']:.0f} requests/s of a server that does nothing\n"
        f"Clarifier with {figures['clarifier_settings']}"
    )
    print(f"  {'':10}  requests/s  p50 ms  p99 ms  resident MB  Clarifier is faster by")
    for name, per_s in throughput.items():
        spread = ratio.get(name)
        times = f"{spread['median']:.2f} ({spread['least']:.2f} to {spread['most']:.2f})" if spread else ""
        print(f"  {name:10}  {per_s:10.0f}  {p50[name]:6.1f}  {p99[name]:6.1f}  {resident[name]:11.0f}  {times}")

"""An attack, rehearsed: who is told of it, and when?

Ten minutes of real images from one key; then one image in twenty is adversarial, made by PGD against the bare
classifier; then, from another key, Square asks two thousand times about one image. The shipped service answers with its
default defense, and a Prometheus with our rules looks on. What the attack watch showed is drawn into `docs/rehearsal/`.

It needs a Prometheus, and CIFAR-10's test images as parquet in the folder that DATA names.
"""

from __future__ import annotations

import io
import os
import random
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn

from benchmarks.client import BUNDLE, serving
from models import load_bundle
from monitoring import own_prometheus
from monitoring.own_prometheus import Prometheus
from service.keys import digest_of, new_key
from training.attacks.by_autoattack import square
from training.attacks.by_foolbox import foolbox_pgd
from training.attacks.threats import Linf

CLEAN_S = 600.0
ATTACKED_S = 240.0
AFTER_S = 30.0
RATE = 20.0
"""Requests a second, of clean traffic with what attacks it."""
SHARE = 0.05
"""Of adversarial images while they are sent."""
SHADOW_RATE = 1.0
"""All are scored, since they are few: what tells is how many are scored a second, here as many as of 400 with 0.05."""
QUERIES = 2000
EPS = 8 / 255
ADVERSARIAL = 256
SEED = 0
WITHIN_S = 120.0
ALERTS = {"pgd": "ClarifierAttackRate", "square": "ClarifierNearDuplicates"}
PICTURES = Path("docs/rehearsal")
STEP_S = 5.0
WANTED = {"told_within_s": WITHIN_S, "told_before": 0}


@dataclass
class Log:
    """What happened when, in seconds since the epoch."""

    began: dict[str, float] = field(default_factory=dict)
    fired: list[tuple[str, float]] = field(default_factory=list)
    """Each alert, whenever it had not fired a moment before."""
    over: threading.Event = field(default_factory=threading.Event)
    requests: int = 0
    adversarial: int = 0
    failed: int = 0


def run() -> dict[str, object]:
    """Measure, print, draw, and return the figures."""
    images, labels = _test_images(Path(os.environ.get("DATA", "data")))
    attacked = _pgd(images[:ADVERSARIAL], labels[:ADVERSARIAL])
    log = Log()
    keys = {name: new_key() for name in ("shop", "scraper")}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        settings = {
            "api_keys_file": _keys_file(folder, keys),
            "shadow_rate": str(SHADOW_RATE),
            "similarity_limit": "50",
        }
        port, _ = stack.enter_context(serving(**settings))
        prometheus = stack.enter_context(
            own_prometheus.running(folder, {"clarifier-gateway": [port], "clarifier-worker": []})
        )
        threads = [
            threading.Thread(target=_traffic, args=(port, keys["shop"], images, attacked, log)),
            threading.Thread(target=_watch, args=(prometheus, log)),
        ]
        log.began["clean"] = time.time()
        for thread in threads:
            thread.start()
        time.sleep(CLEAN_S)
        log.began["pgd"] = time.time()
        time.sleep(ATTACKED_S)
        log.began["square"] = time.time()
        asked = _square(port, keys["scraper"], images[-1], int(labels[-1]))
        ended = time.time()
        time.sleep(AFTER_S)
        log.over.set()
        for thread in threads:
            thread.join()
        _draw(prometheus, log)
    return _figures(log, asked, ended)


def _figures(log: Log, asked: int, ended: float) -> dict[str, object]:
    told: dict[str, float | None] = {}
    before = 0
    for attack, alert in ALERTS.items():
        at = [when for name, when in log.fired if name == alert]
        told[attack] = min((when - log.began[attack] for when in at if when >= log.began[attack]), default=None)
        before += sum(when < log.began[attack] for when in at)
    figures: dict[str, object] = {
        "told_after_s": told,
        "told_before": before,
        "alerts": [(name, round(when - log.began["clean"], 1)) for name, when in log.fired],
        "requests": log.requests,
        "adversarial": log.adversarial,
        "failed": log.failed,
        "queries": asked,
        "queries_a_second": asked / (ended - log.began["square"]),
        "clean_s": CLEAN_S,
        "attacked_s": ATTACKED_S,
        "rate": RATE,
        "share": SHARE,
        "shadow_rate": SHADOW_RATE,
        "seed": SEED,
        "wanted": WANTED,
    }
    print(f"{log.requests} requests in {CLEAN_S + ATTACKED_S:g} s and {asked} queries of Square, {log.failed} failed")
    for attack, alert in ALERTS.items():
        after = told[attack]
        print(f"  {attack}: {alert} " + ("never fired" if after is None else f"after {after:.0f} s"))
    print(f"  before their attack: {before}; all alerts: {figures['alerts']}")
    return figures


# --- who asks


def _test_images(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 32, 32, 3) and (N,). Raises FileNotFoundError."""
    files = sorted(folder.glob("**/test-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} has no test-*.parquet: name the folder of CIFAR-10 in DATA")
    table = parquet.read_table(files).to_pydict()
    pixels = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["img"]]
    return np.stack(pixels), np.array(table["label"])


def _tensor(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255


def _pgd(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """PGD-20 on the bare classifier, rounded to 8 bits as any upload is."""
    torch.manual_seed(SEED)
    classifier = load_bundle(BUNDLE).classifier
    images, wrong = _tensor(pixels), torch.from_numpy(labels)
    made = foolbox_pgd(classifier, images, wrong, eps=EPS, steps=20, step_size=2 / 255)
    rounded: NDArray[np.uint8] = (made * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return rounded


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _keys_file(folder: Path, keys: dict[str, str]) -> str:
    entries = [f'[[key]]\nname = "{name}"\nsha256 = "{digest_of(key.encode()).hex()}"\n' for name, key in keys.items()]
    path = folder / "keys.toml"
    path.write_text("\n".join(entries))
    return str(path)


def _client(port: int, key: str) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": key}, timeout=60)


def _traffic(port: int, key: str, images: NDArray[np.uint8], attacked: NDArray[np.uint8], log: Log) -> None:
    """Images in a random order on the clock; a share of others while the first attack is on."""
    draw = random.Random(SEED)
    order = list(range(ADVERSARIAL, len(images) - 1))
    draw.shuffle(order)
    with _client(port, key) as client:
        due = time.monotonic()
        while not log.over.is_set():
            is_attacked = "pgd" in log.began and "square" not in log.began and draw.random() < SHARE
            image = (
                attacked[log.adversarial % len(attacked)] if is_attacked else images[order[log.requests % len(order)]]
            )
            log.failed += client.post("/classify", content=_png(image)).status_code != 200
            log.requests += 1
            log.adversarial += is_attacked
            due += 1 / RATE
            time.sleep(max(0.0, due - time.monotonic()))


class _Served(nn.Module):
    """The service as an attacker has it: an image in, probabilities out, each call a query."""

    def __init__(self, client: httpx.Client, classes: Sequence[str]) -> None:
        super().__init__()
        self._client, self._classes = client, classes
        self.queries = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms of probabilities (N, K)."""
        return torch.stack([self._ask(image) for image in images])

    def _ask(self, image: Tensor) -> Tensor:
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        answer = self._client.post(f"/classify?top_k={len(self._classes)}", content=_png(pixels)).json()
        self.queries += 1
        probabilities = torch.zeros(len(self._classes))
        for verdict in answer["top"]:
            probabilities[verdict["index"]] = verdict["probability"]
        return probabilities.clamp(min=1e-9).log()


def _square(port: int, key: str, pixels: NDArray[np.uint8], label: int) -> int:
    """Square against the service, on one image; how many queries it made."""
    with _client(port, key) as client:
        served = _Served(client, load_bundle(BUNDLE).classes)
        images, labels = _tensor(pixels[None]), torch.tensor([label])
        square(served, images, labels, Linf(EPS), queries=QUERIES, seed=SEED, is_random=True)
        return served.queries


# --- who looks on


def _watch(prometheus: Prometheus, log: Log) -> None:
    firing = set[str]()
    while not log.over.wait(1.0):
        now = prometheus.firing()
        log.fired += [(name, time.time()) for name in sorted(now - firing)]
        firing = now


def _draw(prometheus: Prometheus, log: Log) -> None:
    """The panels of the attack watch, as they would have shown this hour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start, end = log.began["clean"], time.time()
    shown = {
        "suspicious": (
            "Share of images that AID finds suspicious",
            {
                "in a minute": 'clarifier:suspicious:ratio{window="1m"}',
                "baseline": 'clarifier:suspicious:baseline1d{window="1m"}',
                "alert": "clarifier:suspicious:baseline1d{window='1m'} + 4 * clarifier:suspicious:sigma1d",
            },
        ),
        "flips": (
            "Share of labels that the defense turns",
            {"now": "sum(clarifier:flips:ratio2m)", "baseline": "sum(clarifier:flips:baseline1d)"},
        ),
        "near-duplicates": (
            "Near-duplicates a second, by key",
            {key: f'rate(clarifier_near_duplicates_total{{key="{key}"}}[1m])' for key in ("shop", "scraper")},
        ),
        "purification": (
            "How far purification moves images (L-infinity)",
            {
                f"percentile {int(100 * share)}": f"histogram_quantile({share}, sum by (le) "
                "(rate(clarifier_purification_linf_bucket[1m])))"
                for share in (0.5, 0.95)
            },
        ),
        "labels": (
            "Labels, against their baseline",
            {"": "clarifier:predictions:share10m - clarifier:predictions:baseline1d"},
        ),
    }
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, (title, queries) in shown.items():
        figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
        for legend, query in queries.items():
            for series in prometheus.ask_over(query, start, end, STEP_S):
                minutes = [(float(at) - start) / 60 for at, _ in series["values"]]
                label = legend or series["metric"].get("label", "")
                axes.plot(minutes, [float(value) for _, value in series["values"]], label=label, linewidth=1.2)
        _finish(axes, title, log)
        figure.savefig(PICTURES / f"{name}.png", dpi=110)
        pyplot.close(figure)
    _draw_scores(prometheus, log, start, end)


def _draw_scores(prometheus: Prometheus, log: Log, start: float, end: float) -> None:
    from matplotlib import pyplot

    query = "sum by (le) (rate(clarifier_aid_score_bucket[1m]))"
    series = {float(each["metric"]["le"]): each["values"] for each in prometheus.ask_over(query, start, end, STEP_S)}
    bounds = [bound for bound in sorted(series) if bound <= 1]
    cumulative = np.array([[float(value) for _, value in series[bound]] for bound in bounds])
    heat = np.diff(np.vstack([np.zeros(cumulative.shape[1]), cumulative]), axis=0)
    minutes = [(float(at) - start) / 60 for at, _ in series[bounds[0]]]
    figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    shares = heat / np.maximum(heat.sum(0), 1e-9)
    mesh = axes.pcolormesh(
        minutes, [bound - 0.05 for bound in bounds], np.sqrt(shares), cmap="Oranges", shading="nearest"
    )
    figure.colorbar(mesh, label="square root of the share")
    _finish(axes, "AID score (1 natural, 0 adversarial)", log, legend=False)
    figure.savefig(PICTURES / "scores.png", dpi=110)
    pyplot.close(figure)


def _finish(axes: object, title: str, log: Log, *, legend: bool = True) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    start = log.began["clean"]
    for attack in ALERTS:
        at = (log.began[attack] - start) / 60
        axes.axvline(at, color="gray", linestyle=":", linewidth=1)
        axes.annotate(f" {attack} begins", (at, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    for name, when in log.fired:
        if name in ALERTS.values():
            axes.axvline((when - start) / 60, color="red", linewidth=1)
    axes.set_title(f"{title}; red: the alert fires", fontsize=10)
    axes.set_xlabel("minutes")
    if legend:
        axes.legend(fontsize=7, loc="upper left", ncols=5)

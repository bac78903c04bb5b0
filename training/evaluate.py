"""`evaluate`: levels L0 (clean) and L1 (grey-box) for a bundle and its defenses, into its report.json.

Grey-box means that the attacker sees the classifier and not the defense: Foolbox attacks the classifier alone, and
the images it finds are then given to the defended classifier. That is what the three papers report, and it flatters
every purifier, so the report calls no grey-box number credible evidence of robustness.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest, mannwhitneyu
from torch import Tensor
from tqdm import tqdm

from models import Bundle, load_bundle, write_report
from models.randomness import derive_seed, generator_for
from training.attacks.by_foolbox import foolbox_fgsm, foolbox_pgd
from training.config import EvaluateRecipe
from training.data import DataError, ImageSet, in_batches, load_split
from training.provenance import git_commit, hardware, library_versions

HARMS_CLEAN = "attacked images did better than clean ones: the defense does not keep what was right"
UNDEFENDED = "these attacks know the bare classifier, but stronger ones were not run"
GREY_BOX_ONLY = "only grey-box attacks were run: the attacker did not know the defense"
COST_BATCH = 32
COST_REPEATS = 5


def evaluate(recipe: EvaluateRecipe, directory: Path, device: torch.device) -> dict[str, Any]:
    """Measure a bundle by a recipe and write the report into it; returns the report.

    Raises BundleError for a bundle that cannot be loaded, UnknownDefense for a defense that it does not offer, and
    DataError for data of other classes or another size than the bundle's.
    """
    started = time.monotonic()
    bundle = load_bundle(directory, device)
    for defense in recipe.defenses:
        bundle.manifest.resolve(defense)
    data = load_split(recipe.data, recipe.data.test_split)
    if data.classes != bundle.classes or tuple(data.images.shape[2:]) != bundle.input_size:
        raise DataError(f"{recipe.data.name} has other classes or another input_size than the bundle {directory}")
    shuffled = data.subset(torch.randperm(len(data), generator=generator_for(recipe.seed, "images")))
    attacked = attacked_sets(bundle, head(shuffled, recipe.attacked_images), recipe)

    report: dict[str, Any] = {"undefended": measure(bundle, "none", shuffled, attacked, recipe), "defenses": {}}
    for defense in recipe.defenses:
        report["defenses"][defense] = measure(bundle, defense, shuffled, attacked, recipe)
    if bundle.aid is not None:
        report["detection"] = detection(bundle, attacked, recipe)
    report["recipe"] = {
        "command": "python -m training evaluate --recipe FILE --bundle DIRECTORY",
        "bundle": f"{bundle.manifest.name}@{bundle.manifest.version}",
        **recipe.model_dump(mode="json", exclude={"data": {"source"}}),
        "data_sha256": data.fingerprint(),
        "data_encodings": list(data.encodings),
        "weights_sha256": {n: h for n, h in bundle.manifest.files.items() if n.endswith(".safetensors")},
        "git_commit": git_commit(),
        "libraries": library_versions(),
        "hardware": hardware(),
        "wall_s": round(time.monotonic() - started, 1),
    }
    write_report(directory, report)
    return report


def attacked_sets(bundle: Bundle, clean: ImageSet, recipe: EvaluateRecipe) -> dict[str, ImageSet]:
    """The same images clean and under each grey-box attack on the classifier alone; float images in [0, 1].

    Raises AssertionError if an attack leaves its budget.
    """
    device = device_of(bundle)
    torch.manual_seed(recipe.seed)  # Foolbox draws its random start from torch's global generator
    attacks: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fgsm": lambda images, labels: foolbox_fgsm(bundle.classifier, images, labels, eps=recipe.eps),
        f"pgd{recipe.pgd_steps}": lambda images, labels: foolbox_pgd(
            bundle.classifier, images, labels, eps=recipe.eps, steps=recipe.pgd_steps, step_size=recipe.pgd_step_size
        ),
    }
    sets = {}
    for name, attack in attacks.items():
        parts = list[Tensor]()
        for images, labels in tqdm(list(in_batches(clean, recipe.batch_size, device)), desc=name, unit="batch"):
            adversarial = attack(images, labels)
            assert float((adversarial - images).abs().max()) <= recipe.eps + 1e-6, f"{name} left its budget"
            parts.append(adversarial.cpu())
        sets[name] = ImageSet(torch.cat(parts), clean.labels, clean.classes)
    return {"clean": clean, **sets}


def measure(
    bundle: Bundle, defense: str, clean: ImageSet, attacked: Mapping[str, ImageSet], recipe: EvaluateRecipe
) -> dict[str, Any]:
    """One entry of the report: standard accuracy (L0), grey-box accuracies (L1) and cost."""
    descends = any(name != "atop" for name, _ in bundle.manifest.chain(defense))
    draws = recipe.clean_draws if bundle.defended(defense).is_random else 1
    standard = head(clean, recipe.costly_images if descends else recipe.clean_images)
    grey_box = {
        name: accuracy(
            bundle,
            defense,
            head(images, recipe.costly_images if descends else recipe.attacked_images),
            recipe,
            draws=1,
            what=f"{defense} {name}",
        )
        for name, images in attacked.items()
        if name != "clean"
    }
    clean_accuracy = accuracy(bundle, defense, standard, recipe, draws=draws, what=f"{defense} clean")
    return {
        "standard": clean_accuracy,
        "grey_box": grey_box,
        "adaptive": {},
        "worst_case": None,
        "credible": False,
        "reasons": reasons(defended=bool(bundle.manifest.chain(defense)), standard=clean_accuracy, grey_box=grey_box),
        "cost": round(cost(bundle, defense), 2),
    }


def reasons(*, defended: bool, standard: Mapping[str, Any], grey_box: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why the numbers of one entry are no evidence of robustness.

    One more reason is that an attack's interval lies above that of the clean images.
    """
    found = [GREY_BOX_ONLY if defended else UNDEFENDED]
    if any(cell["interval"][0] > standard["interval"][1] for cell in grey_box.values()):
        found.append(HARMS_CLEAN)
    return found


def device_of(bundle: Bundle) -> torch.device:
    """Where the bundle is loaded."""
    return bundle.classifier.normalize.mean.device


def head(data: ImageSet, count: int) -> ImageSet:
    """The first `count` images, or all where there are fewer."""
    return data.subset(torch.arange(min(count, len(data))))


def accuracy(
    bundle: Bundle, defense: str, data: ImageSet, recipe: EvaluateRecipe, *, draws: int, what: str
) -> dict[str, Any]:
    """The share of images labeled right, averaged over `draws` of the defense's randomness, with its interval.

    Every image and draw has a seed of its own. The interval is Wilson's at 95 %, for n images.
    """
    right = 0
    with tqdm(total=draws * len(data), desc=what, unit="image", leave=False) as bar:
        for draw in range(draws):
            seeds = [derive_seed(recipe.seed, "evaluate", draw, index) for index in range(len(data))]
            for images, labels in in_batches(data, recipe.batch_size, device_of(bundle)):
                own, seeds = seeds[: len(labels)], seeds[len(labels) :]
                right += int((bundle.probabilities(defense, images, seed=own).argmax(1) == labels).sum())
                bar.update(len(labels))
    return binomial(right / draws, len(data))


def binomial(right: float, n: int) -> dict[str, Any]:
    """`right` of `n` as accuracy and Wilson's 95 % interval, in [0, 1]."""
    interval = binomtest(round(right), n).proportion_ci(0.95, method="wilson")
    return {"accuracy": round(right / n, 4), "interval": [round(interval.low, 4), round(interval.high, 4)], "n": n}


def detection(bundle: Bundle, attacked: Mapping[str, ImageSet], recipe: EvaluateRecipe) -> dict[str, Any]:
    """How well the AID score tells clean images from attacked ones: AUROC, and rates at the bundle's threshold."""
    threshold = bundle.manifest.aid_threshold
    assert threshold is not None
    scores = {name: aid_scores(bundle, data, recipe) for name, data in attacked.items()}
    clean = scores.pop("clean")
    return {
        "threshold": threshold,
        "false_positive_rate": binomial(float((clean < threshold).sum()), len(clean)),
        "attacks": {
            name: {
                "auroc": round(auroc(clean, found), 4),
                "detected": binomial(float((found < threshold).sum()), len(found)),
            }
            for name, found in scores.items()
        },
    }


def aid_scores(bundle: Bundle, data: ImageSet, recipe: EvaluateRecipe) -> Tensor:
    """The AID score of every image, (N,)."""
    batches = in_batches(data, recipe.batch_size, device_of(bundle))
    return torch.cat([bundle.aid_score(images).cpu() for images, _ in batches])


def auroc(natural: Tensor, adversarial: Tensor) -> float:
    """The probability that a natural image scores above an adversarial one (Mann-Whitney U over both counts)."""
    # In float32 the sum of ranks would lose its last digits, and would be no number that JSON knows.
    statistic = float(mannwhitneyu(natural.double().numpy(), adversarial.double().numpy()).statistic)
    return statistic / (len(natural) * len(adversarial))


def cost(bundle: Bundle, defense: str) -> float:
    """Time of defended over undefended inference for a batch of 32, the best of five runs of each, in turn."""
    device = device_of(bundle)
    images = torch.rand(COST_BATCH, 3, *bundle.input_size, generator=generator_for(0, "cost")).to(device)
    best = {"none": float("inf"), defense: float("inf")}
    for _ in range(COST_REPEATS):
        for name in best:
            began = time.perf_counter()
            bundle.probabilities(name, images, seed=0).cpu()
            best[name] = min(best[name], time.perf_counter() - began)
    return best[defense] / best["none"]


def table(report: Mapping[str, Any]) -> str:
    """The report as the table that is printed on the terminal."""
    rows = [("undefended", report["undefended"]), *report["defenses"].items()]
    attacks = list(report["undefended"]["grey_box"])
    lines = [f"{'defense':<18}" + "".join(f"{name:>26}" for name in ["standard", *attacks]) + f"{'cost':>9}"]
    for name, row in rows:
        cells = [row["standard"], *(row["grey_box"][attack] for attack in attacks)]
        lines.append(f"{name:<18}" + "".join(f"{_cell(cell):>26}" for cell in cells) + f"{row['cost']:>8.1f}x")
    if "detection" in report:
        found = (f"{name} {values['auroc']:.4f}" for name, values in report["detection"]["attacks"].items())
        lines.append(f"AID score, AUROC clean against attacked: {', '.join(found)}")
    lines.append(f"Grey-box accuracy is no evidence of robustness: {GREY_BOX_ONLY}.")
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{100 * cell['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f}, {cell['n']})"

"""Why two rows of the papers' tables differ from ours: the measurements behind remarks of docs/reproduction.md.

`python -m training.explanations --data FOLDER` prints them, once `runs/bundles` has ZeroPur's Vanilla, Standard and
Strong; docs/reproduction.md says how to make them. Images and attacks are drawn by seed 0, what RT3 hides of an
image by its number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models import Bundle, BundleError, load_bundle
from models.atop import AtopPurifier
from models.blur import blur
from models.classifiers import Classifier
from models.manifest import AtopPreset, BlurSpec
from models.randomness import generator_for
from training.attacks.by_foolbox import foolbox_pgd
from training.config import DataRecipe
from training.data import DataError, load_split, to_float

BATCH = 64
EPS = 8 / 255
GAUSSIAN = BlurSpec(kind="gaussian", size=1.2)
BLURRED = 128
"""Images that are attacked and blurred."""
RESTORED = 512
"""Images that RT3 hides and the in-painter restores."""
TRANSFORMS = {
    "rt3": AtopPreset(transform="rt3", working_size=32, sigma=1 / 32),
    "rt3 without noise": AtopPreset(transform="rt3", working_size=32, sigma=0.0),
    "rt3 in sixteen passes": AtopPreset(transform="rt3", working_size=32, sigma=1 / 32, mask_ratio=1 / 16),
}


def share_right(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent on images (N, 3, H, W) in [0, 1]."""
    with torch.no_grad():
        found = torch.cat([classifier(part).argmax(1) for part in images.split(BATCH)])
    return 100 * float((found == labels).float().mean())


def pgd20(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """White-box PGD-20, l-inf 8/255, from a random start that seed 0 draws; same shape as the images."""
    torch.manual_seed(0)
    pairs = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    return torch.cat([foolbox_pgd(classifier, *pair, eps=EPS, steps=20, step_size=EPS / 4) for pair in pairs])


def left_by_the_blur(classifier: Classifier, images: Tensor, attacked: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy on clean and blurred images, and on clean ones with only that part of the attack that blurring leaves.

    A Gaussian is linear, so the part is the difference of the two blurred images. What it is added to may leave [0, 1].
    """
    soft = blur(images, GAUSSIAN)
    part = blur(attacked, GAUSSIAN) - soft
    return {
        "clean": share_right(classifier, images, labels),
        "clean, blurred": share_right(classifier, soft, labels),
        "attacked, blurred": share_right(classifier, blur(attacked, GAUSSIAN), labels),
        "clean, and what the blur leaves of the attack": share_right(classifier, images + part, labels),
    }


def restore(bundle: Bundle, preset: AtopPreset, images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] after the bundle's in-painter with this transform; each draws from its number.

    Raises ValueError for a bundle that has none.
    """
    if bundle.inpainter is None:
        raise ValueError(f"{bundle.manifest.name} has no in-painter")
    purifier, seeds = AtopPurifier(bundle.inpainter, preset), torch.arange(len(images)).split(BATCH)
    with torch.no_grad():
        return torch.cat([purifier(images[part], part.tolist()) for part in seeds])


def main(arguments: list[str] | None = None) -> int:
    """Print both measurements, in percent; the exit status is 2 if data or bundles cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m training.explanations", description=__doc__)
    parser.add_argument("--data", required=True, help="a folder with CIFAR-10")
    try:
        measure(parser.parse_args(arguments).data)
    except (DataError, BundleError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure(source: str) -> None:
    """Raises DataError for data, and BundleError for bundles, that cannot be read."""
    test = load_split(DataRecipe(name="CIFAR-10", source=source, input_size=32), "test")
    chosen = test.subset(torch.randperm(len(test), generator=generator_for(0, "images"))[:RESTORED])
    images, labels = to_float(chosen.images, torch.device("cpu")), chosen.labels

    shipped = load_bundle("models/bundles/cifar10/1")
    classifiers = {"cifar10@1": shipped.classifier}
    for name in ("vanilla", "standard", "strong"):
        classifiers[name] = load_bundle(Path("runs/bundles") / f"cifar10-{name}-small" / "1").classifier

    few, few_labels = images[:BLURRED], labels[:BLURRED]
    attacks = {name: pgd20(classifier, few, few_labels) for name, classifier in classifiers.items()}
    for name, classifier in classifiers.items():
        show(f"{name}, n {BLURRED}", left_by_the_blur(classifier, few, attacks[name], few_labels))
    crossed = share_right(classifiers["strong"], blur(attacks["cifar10@1"], GAUSSIAN), few_labels)
    show(f"strong, n {BLURRED}", {"the attack on cifar10@1, blurred": crossed})

    show(f"as they are, n {RESTORED}", {name: share_right(each, images, labels) for name, each in classifiers.items()})
    for name, preset in TRANSFORMS.items():
        restored = restore(shipped, preset, images)
        off = 255 * float((restored - images).square().mean().sqrt())
        found = {which: share_right(each, restored, labels) for which, each in classifiers.items()}
        show(f"{name}, n {RESTORED}", {**found, "root mean square, of 255": off})


def show(what: str, numbers: Mapping[str, float]) -> None:
    """One line."""
    print(f"{what}: " + "; ".join(f"{name} {value:.1f}" for name, value in numbers.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Tiny networks for tests: smooth, seeded, quick, behind the real protocol."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.aid import Aid, AidDiscriminator, tap_channels
from models.atop import build_inpainter
from models.bundle import Bundle
from models.classifiers import Classifier, build_classifier
from models.manifest import (
    AidPreset,
    AidSpec,
    AtopPreset,
    AtopSpec,
    AutoPreset,
    AutoSpec,
    BlurSpec,
    ClassifierSpec,
    Defenses,
    InpainterSpec,
    Manifest,
    ZeroPurPreset,
    ZeroPurSpec,
)
from models.unet import UNet

SIZE = 16
REAL_SIZE = 32
"""Of the bundle that can be saved and loaded."""


def tiny_classifier(num_classes: int = 4, seed: int = 0) -> Classifier:
    """Two smooth convolutions, average pooling and a linear head; frozen, in eval mode."""
    torch.manual_seed(seed)
    stages: dict[str, nn.Module] = {
        "stage1": nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GELU()),
        "stage2": nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.GELU()),
        "pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "head": nn.Linear(8, num_classes),
    }
    return Classifier(stages).eval().requires_grad_(False)


def sensitive(classifier: Classifier, images: Tensor) -> Classifier:
    """The classifier, its head changed so that it tells these images apart, and an attack can turn its answers."""
    head = classifier.stages["head"]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight *= 30
        head.bias.copy_(-head.weight @ classifier.embedding(images).mean(0))
    return classifier


def tiny_aid_spec(layout: str = "code") -> AidSpec:
    return AidSpec.model_validate({"layout": layout, "taps": ("stage1", "stage2"), "width": 8})


def tiny_aid(classifier: Classifier, layout: str = "code") -> Aid:
    spec = tiny_aid_spec(layout)
    discriminator = AidDiscriminator(spec, tap_channels(classifier, spec.taps, (SIZE, SIZE)))
    return Aid(classifier, discriminator.eval().requires_grad_(False), spec.taps)


def zeropur_preset(**changes: object) -> ZeroPurPreset:
    settings = {"blur": BlurSpec(kind="gaussian", size=0.8), "fine_layers": ("stage1", "stage2"), "fine_steps": 5}
    return ZeroPurPreset.model_validate({**settings, **changes})


def tiny_unet(seed: int = 0) -> UNet:
    """A U-Net whose every weight is random, so that it changes images."""
    net, generator = UNet(width=4), torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.requires_grad_(False)


def tiny_manifest() -> Manifest:
    atop = {
        "rt1": AtopPreset(transform="rt1", working_size=SIZE, sigma=0),
        "rt2": AtopPreset(transform="rt2", working_size=SIZE, sigma=0.1),
        "rt3": AtopPreset(transform="rt3", working_size=SIZE, sigma=0.1),
    }
    zeropur = {"code": zeropur_preset(), "coarse": zeropur_preset(fine_steps=0)}
    return Manifest(
        name="tiny",
        version="1",
        classes=("a", "b", "c", "d"),
        input_size=(SIZE, SIZE),
        classifier=ClassifierSpec(architecture="tiny"),
        defenses=Defenses(
            atop=AtopSpec(inpainter=InpainterSpec(architecture="unet", width=4), default_preset="rt2", presets=atop),
            aid=tiny_aid_spec().model_copy(update={"presets": {"code": AidPreset(steps=3)}}),
            zeropur=ZeroPurSpec(default_preset="code", presets=zeropur),
        ),
        default_defense="atop",
    )


def with_auto(bundle: Bundle, threshold: float, *, strong: str = "zeropur", cheap: str = "none") -> Bundle:
    """The same networks behind a manifest that also offers `auto`."""
    preset = AutoPreset(strong=strong, cheap=cheap, threshold=threshold, false_positive_rate=0.1)
    auto = AutoSpec(default_preset="gate", presets={"gate": preset})
    content = bundle.manifest.model_dump()
    content["defenses"]["auto"] = auto.model_dump()
    aid = bundle.aid
    discriminator = None if aid is None else aid.discriminator
    manifest = Manifest.model_validate(content)
    return Bundle(manifest, bundle.classifier, inpainter=bundle.inpainter, discriminator=discriminator)


def tiny_bundle() -> Bundle:
    """A bundle of tiny networks with every defense; its architecture has no name, so it cannot be loaded again."""
    classifier = tiny_classifier()
    return Bundle(tiny_manifest(), classifier, inpainter=tiny_unet(), discriminator=tiny_aid(classifier).discriminator)


def real_manifest() -> Manifest:
    """Like the tiny one, with an architecture that has a name."""
    manifest = tiny_manifest()
    specs = manifest.defenses
    assert specs.atop is not None
    assert specs.aid is not None
    assert specs.zeropur is not None
    presets = {"rt2": AtopPreset(transform="rt2", working_size=REAL_SIZE, sigma=0.1)}
    layers = ("stage2", "stage3")
    defenses = specs.model_copy(
        update={
            "atop": specs.atop.model_copy(update={"presets": presets}),
            "aid": specs.aid.model_copy(update={"taps": ("stem", "stage2")}),
            "zeropur": specs.zeropur.model_copy(update={"presets": {"code": zeropur_preset(fine_layers=layers)}}),
        }
    )
    changes = {
        "input_size": (REAL_SIZE, REAL_SIZE),
        "classifier": ClassifierSpec(architecture="wrn-16-2"),
        "defenses": defenses,
    }
    return manifest.model_copy(update=changes)


def real_bundle() -> Bundle:
    """Untrained, and sound: it can be saved and loaded."""
    torch.manual_seed(0)
    manifest = real_manifest()
    classifier = build_classifier("wrn-16-2", num_classes=4, input_size=REAL_SIZE, mean=(0.5, 0.4, 0.3)).eval()
    assert manifest.defenses.atop is not None
    assert manifest.defenses.aid is not None
    channels = tap_channels(classifier, manifest.defenses.aid.taps, (REAL_SIZE, REAL_SIZE))
    return Bundle(
        manifest,
        classifier,
        inpainter=build_inpainter(manifest.defenses.atop.inpainter),
        discriminator=AidDiscriminator(manifest.defenses.aid, channels),
    )

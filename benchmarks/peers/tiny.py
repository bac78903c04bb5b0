"""The network that every server runs, its bundle for Clarifier, and what the others load.

`python -m benchmarks.peers.tiny` is `python -m service`, but knows this network's architecture. A network of about 10
million operations an image takes a tenth of a millisecond on one core: what is left of a request is the server.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import models.classifiers
from models import Bundle
from models.bundle_files import save_bundle
from models.classifiers import build_classifier
from models.manifest import ClassifierSpec, Defenses, Manifest
from service.__main__ import main
from service.images import decode_image

ARCHITECTURE = "benchmark-tiny"
MFLOP = 9.9
"""Of one image, a multiply-add being two."""
SIZE = 32
PHOTO_SIZE = 48
"""Of the uploads, so that there is something to resize; a JPEG of it has about 1 kB."""
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PHOTOGRAPH = Path("examples/cat.jpg")


def stages(num_classes: int, input_size: int) -> dict[str, nn.Module]:
    """Four convolutions, the first three of stride 2; 9.9 million operations (a multiply-add is two) at 32 pixels."""
    del input_size
    convolutions = nn.Sequential(_convolution(3, 32, 2), _convolution(32, 64, 2), _convolution(64, 128, 2))
    return {
        "stage1": convolutions,
        "stage2": _convolution(128, 128, 1),
        "pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "head": nn.Linear(128, num_classes),
    }


def _convolution(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


def know_architecture() -> None:
    """Have bundles of this architecture load in this process."""
    models.classifiers.ARCHITECTURES[ARCHITECTURE] = stages  # type: ignore[index]


def tiny_bundle() -> Bundle:
    """A bundle of random weights that offers no defense but `none`; its answers differ from picture to picture."""
    know_architecture()
    torch.manual_seed(0)
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    classifier = build_classifier(ARCHITECTURE, num_classes=len(CLASSES), input_size=SIZE, mean=mean, std=std)
    with torch.no_grad():
        for _ in range(50):  # the statistics of batch norm
            classifier.train()(torch.rand(64, 3, SIZE, SIZE))
        head = classifier.stages["head"]
        assert isinstance(head, nn.Linear)
        seen = torch.cat([model_input(photo) for photo in photos()])
        head.weight *= 30
        head.bias.copy_(-head.weight @ classifier.eval().embedding(seen).mean(0))  # tells the photographs apart
        for name, value in classifier.state_dict().items():
            classifier.state_dict()[name].copy_(value.half())  # as bundles keep them
    manifest = Manifest(
        name="tiny",
        version="1",
        classes=CLASSES,
        input_size=(SIZE, SIZE),
        classifier=ClassifierSpec(architecture=ARCHITECTURE),
        defenses=Defenses(),
        default_defense="none",
    )
    return Bundle(manifest, classifier)


def export(bundle: Bundle, folder: Path) -> None:
    """`folder/bundles/tiny/1` for Clarifier; `folder/network.pt` and `folder/classes.json` for the others.

    Theirs is TorchScript with its batch norms folded into the convolutions, as it is commonly served.
    """
    save_bundle(bundle, folder / "bundles" / "tiny" / "1")
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(bundle.classifier, torch.rand(2, 3, SIZE, SIZE))
        torch.jit.freeze(traced).save(str(folder / "network.pt"))


def photos() -> list[bytes]:
    """Two JPEGs of about 1 kB: the middle of the example photograph and its upper left."""
    with Image.open(PHOTOGRAPH) as file:
        photograph = file.convert("RGB")
    side = min(photograph.size) // 2
    corners = [((photograph.width - side) // 2, (photograph.height - side) // 2), (0, 0)]
    return [_jpeg(photograph.crop((x, y, x + side, y + side)).resize((PHOTO_SIZE, PHOTO_SIZE))) for x, y in corners]


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=70)
    return file.getvalue()


def expected(bundle: Bundle, photo: bytes) -> Tensor:
    """The probabilities (K,) of the photograph, from the bundle itself."""
    return bundle.probabilities("none", model_input(photo))[0]


def model_input(photo: bytes) -> Tensor:
    """(1, 3, SIZE, SIZE) in [0, 1], by the service's recipe."""
    pixels = torch.from_numpy(decode_image(photo, (SIZE, SIZE), PHOTO_SIZE**2).pixels.copy())
    return pixels.permute(2, 0, 1)[None].float() / 255


if __name__ == "__main__":
    know_architecture()
    main()

"""Classifiers behind one small protocol: logits, a pooled embedding, and features by name.

Everything downstream (AID, ZeroPur, AToP, attacks, the service) asks a `Classifier` for tensors and never
for its architecture. Our own networks are sequences of named stages; a user's network joins by naming
its layers (`AdoptedClassifier`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.resnet import resnet
from models.resnet9 import resnet9
from models.speednet import speednet
from models.vgg import vgg19
from models.wideresnet import wideresnet

Stages = Mapping[str, nn.Module]


class Normalize(nn.Module):
    """Images in [0, 1] to zero mean and unit variance, (x - mean) / std per channel.

    It is the classifier's first layer, so that eps, sigma, attacks and purifiers all speak one scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """A network made of named stages that run one after the other; the last stage gives the logits.

    `stages` maps names to modules, shallow to deep; `embedding_stage` names the one whose output is the
    pooled embedding. No stage may change its input in place: it may be a feature that somebody asked for.
    Images are float32 (N, 3, H, W) in [0, 1].
    """

    def __init__(
        self,
        stages: Stages,
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        embedding_stage: str = "pool",
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stages = nn.ModuleDict(stages)
        self.embedding_stage = embedding_stage
        self.refuse_unknown([embedding_stage])

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names that `features` knows, shallow to deep."""
        return tuple(self.stages)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        features: Tensor = self.normalize(images)
        for stage in self.stages.values():
            features = stage(features)
        return features

    def features(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        """The outputs of the named stages, in the order asked for; nothing past the deepest one runs.

        Raises KeyError for a name that the classifier does not have.
        """
        self.refuse_unknown(names)
        wanted, found = set(names), dict[str, Tensor]()
        features = self.normalize(images)
        for name, stage in self.stages.items():
            features = stage(features)
            if name in wanted:
                found[name] = features
                if len(found) == len(wanted):
                    break
        return [found[name] for name in names]

    def embedding(self, images: Tensor) -> Tensor:
        """The pooled embedding (N, D), the input of the last linear layer."""
        return self.features(images, [self.embedding_stage])[0].flatten(1)

    def refuse_unknown(self, names: Sequence[str]) -> None:
        """Raise KeyError for names that `features` does not know."""
        unknown = [name for name in names if name not in self.feature_names]
        if unknown:
            raise KeyError(f"no feature named {unknown}; this classifier has {list(self.feature_names)}")


class MirroredClassifier(Classifier):
    """A classifier that looks at every image and at its mirror image, and answers with the mean of both.

    An image and its mirror image so get the same logits and embedding, and features that mirror each other: maps of
    the mirror image are turned back before the mean is taken. Both run in one batch, at twice the cost. In training
    mode it is the plain network, which random flips show both sides.
    """

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if self.training else _mean_of_sides(super().forward(_both_sides(images)))

    def features(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        if self.training:
            return super().features(images, names)
        return [_mean_of_sides(feature) for feature in super().features(_both_sides(images), names)]


def _both_sides(images: Tensor) -> Tensor:
    return torch.cat([images, images.flip(-1)])


def _mean_of_sides(features: Tensor) -> Tensor:
    """Maps (2N, C, H, W) to (N, C, H, W), vectors (2N, D) to (N, D)."""
    seen, mirrored = features.chunk(2)
    return (seen + (mirrored.flip(-1) if mirrored.dim() == 4 else mirrored)) / 2


class _DeepestFeatureReached(Exception):
    """Ends the forward pass of a foreign network once every wanted feature is there."""


class AdoptedClassifier(Classifier):
    """A user's own network: any `nn.Module` whose forward gives logits, joined by naming its layers.

    `layers` maps the names we use to the network's own dotted module names, shallow to deep, for example
    `{"stage3": "layer3", "stage4": "layer4", "pool": "avgpool"}`. Inputs outside [0, 1] are the
    network's business: give its `mean` and `std` here. Where a layer runs more than once, its first
    output counts. Raises AttributeError for a layer it lacks.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Mapping[str, str],
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        embedding_stage: str = "pool",
    ) -> None:
        self._layer_names = dict(layers)
        super().__init__({}, mean=mean, std=std, embedding_stage=embedding_stage)
        self.network = network
        for layer in layers.values():
            network.get_submodule(layer)

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(self._layer_names)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits

    def features(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        self.refuse_unknown(names)
        wanted, found = set(names), dict[str, Tensor]()

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                if name not in found:
                    found[name] = output.clone()  # the network's next layer may work in place
                if len(found) == len(wanted):
                    raise _DeepestFeatureReached

            return hook

        layers = [(name, self.network.get_submodule(self._layer_names[name])) for name in wanted]
        hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers]
        try:
            self.network(self.normalize(images))
        except _DeepestFeatureReached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [found[name] for name in names]


# Each takes (num_classes, input_size) and returns its stages, shallow to deep, "pool" and "head" last.
ARCHITECTURES: Mapping[str, Callable[[int, int], dict[str, nn.Module]]] = {
    "resnet18": lambda classes, size: resnet("basic", (2, 2, 2, 2), classes, size),
    "resnet34": lambda classes, size: resnet("basic", (3, 4, 6, 3), classes, size),
    "resnet50": lambda classes, size: resnet("bottleneck", (3, 4, 6, 3), classes, size),
    "wrn-28-10": lambda classes, size: wideresnet(28, 10, classes, size),
    "wrn-34-10": lambda classes, size: wideresnet(34, 10, classes, size),
    "wrn-70-16": lambda classes, size: wideresnet(70, 16, classes, size),
    "wrn-16-2": lambda classes, size: wideresnet(16, 2, classes, size),
    "wrn-16-4": lambda classes, size: wideresnet(16, 4, classes, size),
    "wrn-28-2": lambda classes, size: wideresnet(28, 2, classes, size),
    "vgg19": lambda classes, size: vgg19(classes, size),
    "resnet9": lambda classes, size: resnet9(64, classes, size),
    "resnet9-half": lambda classes, size: resnet9(32, classes, size),
    "speednet": lambda classes, size: speednet(classes, size),
}


def build_classifier(
    architecture: str,
    *,
    num_classes: int,
    input_size: int,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    mirrored: bool = False,
) -> Classifier:
    """A freshly initialized classifier for square images of `input_size` pixels, `mirrored` or plain.

    Raises ValueError for an architecture that is not in `ARCHITECTURES`.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {sorted(ARCHITECTURES)}")
    kind = MirroredClassifier if mirrored else Classifier
    return kind(ARCHITECTURES[architecture](num_classes, input_size), mean=mean, std=std)

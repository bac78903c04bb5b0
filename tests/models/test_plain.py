"""Gradients as plain graphs: the same numbers as autograd's, for batches of any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classifiers import Classifier, build_classifier
from models.plain import plain_graph

SIZES = (1, 2, 5)
ARCHITECTURES = ["speednet", "resnet9-half", "resnet18", "wrn-16-2", "vgg19"]


def gradient_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """As the defenses take it: of the sum, by the images."""
    return lambda images: torch.func.grad(lambda x: function(x).sum())(images)


def assert_alike(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    """In float64: in float32 a rounding decides here and there which of two pixels is the larger."""
    graph = plain_graph(function, torch.rand(1, *shape, dtype=torch.float64))
    for count in SIZES:
        images = torch.rand(count, *shape, dtype=torch.float64)
        expected = function(images)
        largest = float(expected.abs().max())
        assert largest > 0
        torch.testing.assert_close(graph(images), expected, rtol=0, atol=1e-9 * largest)


def frozen(network: nn.Module) -> nn.Module:
    """In eval mode, its norms with statistics that are not trivial."""
    generator = torch.Generator().manual_seed(0)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=generator) / 10)
            part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)
    return network.double().eval().requires_grad_(False)


@pytest.mark.parametrize(("architecture", "mirrored"), [*((name, False) for name in ARCHITECTURES), ("speednet", True)])
def test_a_classifiers_gradient_is_autograds(architecture: str, mirrored: bool) -> None:
    torch.manual_seed(0)
    classifier = frozen(build_classifier(architecture, num_classes=10, input_size=32, mirrored=mirrored))
    assert isinstance(classifier, Classifier)
    assert_alike(gradient_of(lambda x: classifier.embedding(x).square().sum(1)), (3, 32, 32))


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(3, 4, 2, stride=2),
        nn.Conv2d(3, 4, 3, padding=2, dilation=2),
        nn.Conv2d(3, 6, 3, padding=1, groups=3),
        nn.Conv2d(3, 4, 1, padding=1),
        nn.Conv2d(3, 4, (3, 5), stride=(1, 3), padding=(0, 2)),
    ],
)
def test_a_convolutions_gradient_is_a_convolution(convolution: nn.Conv2d) -> None:
    frozen(convolution)
    assert_alike(gradient_of(lambda x: convolution(x).square()), (3, 9, 11))


@pytest.mark.parametrize(("pool", "shape"), [(nn.MaxPool2d(2), (3, 9, 8)), (nn.MaxPool2d((3, 2)), (2, 10, 7))])
def test_of_equal_pixels_the_first_is_the_maximum(pool: nn.Module, shape: tuple[int, ...]) -> None:
    gradient = gradient_of(lambda x: pool(x).square())
    images = (torch.rand(4, *shape) * 3).round()  # many are equal
    torch.testing.assert_close(plain_graph(gradient, torch.rand(1, *shape))(images), gradient(images))


def test_so_it_is_where_one_pixel_is_left() -> None:
    gradient = gradient_of(lambda x: nn.AdaptiveMaxPool2d(1)(x).square())
    images = (torch.rand(4, 3, 5, 6) * 3).round()
    torch.testing.assert_close(plain_graph(gradient, torch.rand(1, 3, 5, 6))(images), gradient(images))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2), nn.MaxPool2d(2, padding=1), nn.AdaptiveMaxPool2d(2)])
def test_what_has_no_plain_form_is_refused(pool: nn.Module) -> None:
    with pytest.raises(ValueError, match="plain form"):
        plain_graph(gradient_of(lambda x: pool(x).square()), torch.rand(1, 3, 8, 8))


def test_a_gradient_by_weights_is_refused() -> None:
    convolution = nn.Conv2d(3, 4, 3)

    def by_weights(images: Tensor) -> Tensor:
        weight = convolution.weight.detach()
        gradient: Tensor = torch.func.grad(lambda w: F.conv2d(images, w).square().sum())(weight)
        return gradient

    with pytest.raises(ValueError, match="plain form"):
        plain_graph(by_weights, torch.rand(1, 3, 8, 8))

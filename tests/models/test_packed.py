"""Packed convolutions compute what plain ones do, and so do their derivatives."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from models.packed import MAX_PACKED_BATCH, PackedConv2d, packed_twin

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")

SHAPES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 0, "bias": False},
    {"kernel_size": (1, 4), "padding": (0, 2)},
    {"kernel_size": 2, "padding": 1},
    {"kernel_size": 1},
]


def frozen_pair(**options: object) -> tuple[nn.Conv2d, PackedConv2d]:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, **options)  # type: ignore[arg-type]
    return conv.requires_grad_(False), PackedConv2d(conv)


def images(count: int = MAX_PACKED_BATCH) -> Tensor:
    return torch.rand(count, 3, 9, 11, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", SHAPES)
def test_answers_and_gradients_are_those_of_the_plain_convolution(options: dict[str, object]) -> None:
    conv, packed = frozen_pair(**options)
    plain_input, packed_input = images().requires_grad_(), images().requires_grad_()
    expected, answer = conv(plain_input), packed(packed_input)
    assert packed._packed is not None
    torch.testing.assert_close(answer, expected)
    weights = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, plain_input, weights)
    (gradient,) = torch.autograd.grad(answer, packed_input, weights)
    torch.testing.assert_close(gradient, expected_gradient)


def test_second_derivatives_are_right() -> None:
    conv, packed = frozen_pair(kernel_size=3, padding=1)

    def curvature(network: nn.Module) -> Tensor:
        points = images(1).requires_grad_()
        (slope,) = torch.autograd.grad(network(points).pow(3).sum(), points, create_graph=True)
        (result,) = torch.autograd.grad(slope.pow(2).sum(), points)
        return result

    torch.testing.assert_close(curvature(packed), curvature(conv))


def test_changed_weights_are_packed_again() -> None:
    conv, packed = frozen_pair(kernel_size=3)
    packed(images())
    conv.weight.mul_(2)
    torch.testing.assert_close(packed(images()), conv(images()))
    assert packed.weight is conv.weight


def test_weights_are_packed_once_for_each_shape_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pack, shapes = torch._C._nn.mkldnn_reorder_conv2d_weight, list[list[int]]()

    def noted(*arguments: Any) -> Tensor:
        *_, shape = arguments
        shapes.append(shape)
        result: Tensor = pack(*arguments)
        return result

    monkeypatch.setattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", noted)
    conv, packed = frozen_pair(kernel_size=3, padding=1)
    small, large = images(1), torch.rand(2, 3, 16, 16)
    for points in (small, large, small, large):
        torch.testing.assert_close(packed(points), conv(points))
    assert shapes == [[1, 3, 9, 11], [2, 3, 16, 16]]


@pytest.mark.parametrize("what", ["batch", "training", "autocast", "float64"])
def test_everything_else_is_computed_as_ever(what: str) -> None:
    conv, packed = frozen_pair(kernel_size=3)
    points = images(MAX_PACKED_BATCH + 1 if what == "batch" else 1)
    if what == "training":
        conv.requires_grad_(True)
    if what == "float64":
        conv, packed, points = conv.double(), packed.double(), points.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        assert torch.equal(packed(points), conv(points))
    assert packed._packed is None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own rules for tangents
def test_tangents_are_those_of_the_plain_convolution() -> None:
    conv, packed = frozen_pair(kernel_size=3)
    with forward_ad.dual_level():
        points = forward_ad.make_dual(images(), images())
        expected, answer = (forward_ad.unpack_dual(network(points)) for network in (conv, packed))
    torch.testing.assert_close(answer, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func's own import
def test_functional_gradients_are_those_of_the_plain_convolution() -> None:
    conv, packed = frozen_pair(kernel_size=3)
    expected, answer = (torch.func.grad(lambda x, n=network: n(x).pow(2).sum())(images()) for network in (conv, packed))
    torch.testing.assert_close(answer, expected)


def test_only_plain_convolutions_are_packed_and_the_network_keeps_its_names() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 1, padding=1),
    )
    names = list(network.state_dict())
    twin = packed_twin(network)
    kinds = [type(module).__name__ for module in twin.modules() if isinstance(module, nn.Conv2d)]
    assert kinds == ["PackedConv2d", "PackedConv2d", "Conv2d", "Conv2d", "Conv2d", "Conv2d"]
    assert list(twin.state_dict()) == names
    assert all(mine is own for mine, own in zip(twin.parameters(), network.parameters(), strict=True))
    assert not any(isinstance(module, PackedConv2d) for module in network.modules())


def test_copies_and_files_hold_the_weights_only() -> None:
    conv, packed = frozen_pair(kernel_size=3)
    packed(images())
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for again in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert again._packed is None
        torch.testing.assert_close(again(images()), conv(images()))

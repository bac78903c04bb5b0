"""Convolutions of frozen networks that keep their weights in the layout that oneDNN computes with.

An eager convolution on a CPU brings its weights into that layout on every call. For one 32-pixel image this takes twice
as long as the convolution itself, and for a gradient it is done twice. A packed convolution does it once, for the
weights and for those of its adjoint, which is a convolution too; so gradients of images are as cheap as answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.gradients import is_transformed

MAX_PACKED_BATCH = 2
"""Beyond it packing saves nothing that could be measured."""
MAX_PACKED_SHAPES = 4
"""Of the images of one convolution; each keeps a copy of the weights."""

N = TypeVar("N", bound=nn.Module)
LinearMap = Callable[[Tensor], Tensor]


class PackedConv2d(nn.Conv2d):
    """An `nn.Conv2d` with the same parameters that computes small float32 batches on a CPU with packed weights.

    Everything else (training, autocast, tangents, torch.func, large batches, other devices and types) is computed as
    ever. Weights that are changed are packed again.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)
        self._packed: tuple[LinearMap, LinearMap] | None = None
        self._packed_version: tuple[int, int] | None = None

    def forward(self, images: Tensor) -> Tensor:
        if not self._is_packable(images):
            return super().forward(images)
        version = (self.weight.data_ptr(), self.weight._version)
        if self._packed is None or self._packed_version != version:
            self._packed, self._packed_version = self._pack(), version
        linear, adjoint = self._packed
        if torch.is_grad_enabled() and images.requires_grad:
            convolved: Tensor = _Apply.apply(images, linear, adjoint)  # type: ignore[no-untyped-call]
        else:
            convolved = linear(images)
        return convolved if self.bias is None else convolved + self.bias[:, None, None]

    def _is_packable(self, images: Tensor) -> bool:
        return (
            images.shape[0] <= MAX_PACKED_BATCH
            and images.dtype == self.weight.dtype == torch.float32
            and images.device.type == self.weight.device.type == "cpu"
            and not (torch.is_grad_enabled() and self.weight.requires_grad)
            and not torch.is_autocast_enabled("cpu")
            and not is_transformed()
        )

    def _pack(self) -> tuple[LinearMap, LinearMap]:
        """The convolution without its bias, and its adjoint: flipped, transposed, padded by the rest of the kernel."""
        weight = self.weight.detach()
        padding = [int(side) for side in self.padding]
        rest = [int(size) - 1 - side for size, side in zip(self.kernel_size, padding, strict=True)]
        return _packed_map(weight, padding), _packed_map(weight.transpose(0, 1).flip(2, 3), rest)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was packed: copies and files hold the weights only."""
        return {**self.__dict__, "_packed": None, "_packed_version": None}


class _Apply(torch.autograd.Function):
    """A linear map whose derivative is its adjoint, and so on: derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, linear: LinearMap, adjoint: LinearMap) -> Tensor:
        ctx.maps = adjoint, linear
        return linear(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Apply.apply(gradients[0], *ctx.maps), None, None  # type: ignore[no-untyped-call]


def _packed_map(weight: Tensor, padding: list[int]) -> LinearMap:
    """The convolution with `weight`, which is packed anew for every shape of images.

    oneDNN chooses the layout by the shape. Where it is handed another one, it changes it on every call, and may have no
    fast way to do so: on AVX2 this took a hundred times as long as the convolution.
    """
    one = [1, 1]
    plain = weight.contiguous(memory_format=torch.channels_last).to_mkldnn()

    @lru_cache(MAX_PACKED_SHAPES)
    def packed(shape: torch.Size) -> Tensor:
        pack: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the last argument
        return pack(plain, padding, one, one, 1, list(shape))

    def convolve(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            images, packed(images.shape), None, padding, one, one, 1, "none", [], ""
        )
        return result

    return convolve


def packed_twin(network: N) -> N:
    """A copy of a frozen `network` that shares its parameters and buffers and packs its plain convolutions of stride 1.

    The copy packs nothing where there is no oneDNN.
    """
    shared = [*network.parameters(), *network.buffers()]
    twin = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    if torch.backends.mkldnn.is_available():
        for parent in list(twin.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Conv2d and _can_be_packed(child):
                    setattr(parent, name, PackedConv2d(child))
    return twin


def _can_be_packed(conv: nn.Conv2d) -> bool:
    plain = conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str):
        return False
    return all(side < size for side, size in zip(conv.padding, conv.kernel_size, strict=True))

"""Functions that differentiate as plain graphs: the operators that they run, of backward passes too, and no autograd.

For runtimes that have none, such as ONNX Runtime, and for compilers. A graph is traced once (`make_fx`), and takes
batches of any size. What such runtimes lack is written in operators that they have: the backward pass of a
convolution is a convolution, and that of a maximum a choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
Operator = Callable[..., Any]


def plain_graph(function: Callable[..., Any], *examples: Tensor) -> GraphModule:
    """The operators that `function` runs on tensors such as `examples`, the first dimension of which may differ.

    The parameters of networks that it uses become constants of the graph, so they must not change any more. Raises
    ValueError for an operator whose backward pass has no plain form here.
    """
    table = {**core_aten_decompositions(), **PLAIN}
    batches = tuple(torch.cat([example, example])[:2] for example in examples)  # a batch of 1 would be a constant
    graph = make_fx(function, table, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*batches)
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        if "backward" in str(node.target):
            raise ValueError(f"{node.target} has no plain form")
    graph.recompile()
    return graph


# --- convolutions


def _convolution_backward(
    gradient: Tensor,
    images: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """By its images alone. With steps of 1 it is a convolution by the turned kernel, which runtimes do faster."""
    if wanted[1] or wanted[2] or transposed:
        raise ValueError("only a convolution's gradient by its images has a plain form")
    extents = [step * (side - 1) for step, side in zip(dilation, weight.shape[2:], strict=True)]
    turned = [extent - pad for extent, pad in zip(extents, padding, strict=True)]
    if all(step == 1 for step in stride) and groups == 1 and min(turned) >= 0:
        kernel = weight.flip(2, 3).transpose(0, 1)
        return aten.convolution(gradient, kernel, None, [1, 1], turned, dilation, False, [0, 0], 1), None, None
    rest = [
        images.shape[2 + i] - ((gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + extents[i] + 1)
        for i in (0, 1)
    ]
    return aten.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups), None, None


# --- maxima: of equals the first is taken, as eager does


def _max_pool(
    images: Tensor,
    side: Sequence[int],
    step: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """The maxima of windows that do not overlap, and which pixel of its window each is: a number for our backward."""
    _check_windows(side, step, padding, dilation, ceil_mode)
    best, *others = _windows(images, side)
    chosen = torch.zeros_like(best)
    for number, other in enumerate(others, 1):
        chosen = torch.where(other > best, float(number), chosen)
        best = torch.maximum(best, other)
    return best, chosen


def _max_pool_backward(
    gradient: Tensor,
    images: Tensor,
    side: Sequence[int],
    step: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    chosen: Tensor,
) -> Tensor:
    height, width = side
    nothing = torch.zeros_like(gradient)
    parts = [torch.where(chosen == float(number), gradient, nothing) for number in range(height * width)]
    rows = [torch.stack(parts[start : start + width], 4).flatten(3) for start in range(0, height * width, width)]
    whole = torch.stack(rows, 3).flatten(2, 3)
    return F.pad(whole, (0, images.shape[3] - whole.shape[3], 0, images.shape[2] - whole.shape[2]))


def _check_windows(
    side: Sequence[int], step: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool
) -> None:
    if list(step or side) != list(side) or any(padding) or any(one != 1 for one in dilation) or ceil_mode:
        raise ValueError("a max pool has a plain form only if its windows lie side by side, without padding")


def _windows(images: Tensor, side: Sequence[int]) -> list[Tensor]:
    """The first pixel of every window, the second, and so on, each (N, C, H / height, W / width)."""
    height, width = side
    bottom, right = images.shape[2] // height * height, images.shape[3] // width * width
    return [images[:, :, row:bottom:height, column:right:width] for row in range(height) for column in range(width)]


def _adaptive_max_pool(images: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of each whole plane."""
    if any(one != 1 for one in size):
        raise ValueError("an adaptive max pool has a plain form only if it leaves one pixel")
    best, chosen = images.flatten(2).max(2)
    return best[:, :, None, None], chosen[:, :, None, None]


def _adaptive_max_pool_backward(gradient: Tensor, images: Tensor, chosen: Tensor) -> Tensor:
    places = torch.arange(images.shape[2] * images.shape[3], device=images.device)
    here = places == chosen.flatten(2)
    return torch.where(here, gradient.flatten(2), torch.zeros_like(images).flatten(2)).view_as(images)


PLAIN: dict[Any, Operator] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    aten.adaptive_max_pool2d_backward.default: _adaptive_max_pool_backward,
}

"""Functions of one image whose operators are recorded once and then run without modules or autograd.

For a single image on a CPU the bookkeeping around each operator is a good part of ZeroPur's time. A recording runs the
same operators in the same order on the same weights, so it gives the same bits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_flatten

from models.gradients import is_transformed

logger = logging.getLogger(__name__)

MAX_RECORDINGS = 8
"""Kinds of input that are recorded for one function; others run as ever."""

N = TypeVar("N", bound=nn.Module)
Run = Callable[..., Any]

# What an operator with one of these does is not the same for the next image.
UNRECORDABLE_TAGS = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
# Numbers that leave the tensors unseen by the recording.
UNRECORDABLE_CALLS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}

_recording = threading.Lock()


class Unrecordable(Exception):
    """What the function does depends on the image; the message says how."""


class Recorded:
    """`function` of tensors, recorded for each shape, layout and type of a single image.

    Whatever else `function` uses, such as a network, must not change any more. What is not a single plain image on a
    CPU (batches, tangents, autocast, tracing, images whose gradient is wanted) runs as ever. So does a function that
    draws numbers, whose course or sizes depend on the image's content, or that cannot be recorded for other reasons.
    """

    def __init__(self, function: Run) -> None:
        """`function` takes tensors, the image (1, ...) first, and returns a tensor or a sequence of them."""
        self._function = function
        self._recordings: dict[object, Run] = {}

    def __call__(self, *inputs: Tensor, **named: Any) -> Any:
        if named or not _is_recordable(inputs):
            return self._function(*inputs, **named)
        kind = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        run = self._recordings.get(kind)
        if run is None:
            return self._record(kind, inputs)
        with torch.no_grad():
            return run(*inputs)

    def _record(self, kind: object, inputs: Sequence[Tensor]) -> Any:
        """The function's result, computed as ever, and its operators for the next time."""
        result = self._function(*inputs)
        with _recording:
            if kind not in self._recordings and len(self._recordings) < MAX_RECORDINGS:
                try:
                    self._recordings[kind] = recording(self._function, inputs)
                except Exception as error:  # whatever it is, the answer is there
                    logger.info("%s runs unrecorded: %s", getattr(self._function, "__qualname__", "a function"), error)
                    self._recordings[kind] = self._function
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Without what was recorded: a copy records anew."""
        return {**self.__dict__, "_recordings": {}}


def record_forward(network: N) -> N:
    """`network` itself, whose `forward` is recorded from now on; its other methods are as they were."""
    network.forward = Recorded(network.forward)
    return network


def recording(function: Run, inputs: Sequence[Tensor]) -> Run:
    """The operators that `function` runs on `inputs`, tried on others; it has run once before.

    Raises Unrecordable, or whatever prevents the recording.
    """
    with _NoNumbers():
        graph = make_fx(lambda *tensors: function(*tensors))(*(tensor.detach() for tensor in inputs))
    tags = {tag for node in graph.graph.nodes for tag in getattr(node.target, "tags", ())}
    if tags & UNRECORDABLE_TAGS:
        raise Unrecordable("it draws numbers, or a size depends on the image")
    _tidy(graph)
    generator = torch.Generator().manual_seed(0)
    others = [torch.empty_like(tensor).copy_(torch.rand(tensor.shape, generator=generator)) for tensor in inputs]
    with torch.no_grad():
        if not same_bits(graph(*others), function(*others)):
            raise Unrecordable("another image has another course")
    run: Run = graph.forward
    return run


class _NoNumbers(TorchFunctionMode):
    """Refuses what would make numbers of the first image constants for all others."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in UNRECORDABLE_CALLS:
            raise Unrecordable(f"it calls {func.__name__}")
        return func(*args, **(kwargs or {}))


def _is_recordable(inputs: Sequence[Tensor]) -> bool:
    return (
        inputs[0].shape[0] == 1
        and all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in inputs)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs))
        and not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
        and not is_in_torch_dispatch_mode()
    )


def _tidy(graph: GraphModule) -> None:
    """Drop what only autograd needed."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def same_bits(one: Any, other: Any) -> bool:
    """Whether two trees of tensors agree in structure, types, layouts and every bit."""
    (leaves, structure), (other_leaves, other_structure) = tree_flatten(one), tree_flatten(other)
    return structure == other_structure and all(map(_same, leaves, other_leaves))


def _same(one: Any, other: Any) -> bool:
    """NaNs agree with the same NaN, and 0 is not -0; what is no tensor agrees with nothing."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    alike = (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    return alike and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))

"""Functions of one image whose operators are recorded once and then run without modules or autograd.

For a single image on a CPU the bookkeeping around each operator is a seventh of ZeroPur's time. A recording runs the
same operators in the same order on the same weights, so it gives the same bits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves

from models.gradients import is_transformed

logger = logging.getLogger(__name__)

MAX_RECORDINGS = 8
"""Kinds of input that are kept for one function."""

N = TypeVar("N", bound=nn.Module)
Run = Callable[..., Any]
Kind = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]

# What an operator with one of these does is not the same for the next image.
UNRECORDABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}

_recording = threading.Lock()


class Recorded:
    """`function` of tensors and of the frozen `network`, recorded for each shape and layout of a single image.

    What is not a single plain image on a CPU (batches, tangents, tracing, images whose gradient is wanted, networks in
    training) is computed as ever; so are functions that draw numbers or whose course depends on the image's content.
    Weights that are changed in place are recorded again. A network must not be changed in any other way.
    """

    def __init__(self, network: nn.Module, function: Run) -> None:
        """`function` takes tensors, the image (1, ...) first, and returns a tensor or a sequence of them."""
        self._network, self._function = network, function
        self._tensors = [*network.parameters(), *network.buffers()]
        self._recordings: dict[Kind, Run] = {}
        self._version = self._current_version()

    def __call__(self, *inputs: Tensor) -> Any:
        if not self._is_recordable(inputs):
            return self._function(*inputs)
        version = self._current_version()
        if version != self._version:
            self._recordings, self._version = {}, version
        kind = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        run = self._recordings.get(kind)
        if run is None:
            return self._record(kind, inputs)
        with torch.no_grad():
            return run(*inputs)

    def _is_recordable(self, inputs: tuple[Tensor, ...]) -> bool:
        return (
            inputs[0].shape[0] == 1
            and all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in inputs)
            and not self._network.training
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *self._tensors)))
            and not torch.is_inference_mode_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not is_transformed()
            and not is_in_torch_dispatch_mode()
        )

    def _current_version(self) -> tuple[tuple[int, int], ...]:
        return tuple((tensor.data_ptr(), tensor._version) for tensor in self._tensors)

    def _record(self, kind: Kind, inputs: tuple[Tensor, ...]) -> Any:
        """The function's result, computed as ever, and its operators for the next time."""
        result = self._function(*inputs)
        with _recording:
            if len(self._recordings) == MAX_RECORDINGS:
                self._recordings.pop(next(iter(self._recordings)))
            self._recordings[kind] = self._recording_of(inputs, result) or self._function
        return result

    def _recording_of(self, inputs: tuple[Tensor, ...], expected: Any) -> Run | None:
        """The operators that give `expected`; None, and a line in the log, where they would not do for others."""
        try:
            graph = make_fx(lambda *tensors: self._function(*tensors))(*(tensor.detach() for tensor in inputs))
            _tidy(graph)
            with torch.no_grad():
                recorded = tree_leaves(graph(*inputs))
        except Exception as error:  # whatever it is, the answer is there without a recording
            logger.info("%s runs unrecorded: %s", type(self._network).__name__, error)
            return None
        tags = {tag for node in graph.graph.nodes for tag in getattr(node.target, "tags", ())}
        same = all(map(_same_bits, recorded, tree_leaves(expected)))
        if not same or tags & UNRECORDABLE:
            logger.info("%s runs unrecorded: its operators depend on the image", type(self._network).__name__)
            return None
        run: Run = graph.forward
        return run

    def __getstate__(self) -> dict[str, Any]:
        """Without what was recorded: a copy records its own network."""
        return {**self.__dict__, "_recordings": {}}


def record_forward(network: N) -> N:
    """`network` itself, whose `forward` is recorded from now on; its other methods are as they were."""
    network.forward = Recorded(network, network.forward)
    return network


def _tidy(graph: GraphModule) -> None:
    """Drop what only autograd needed."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)

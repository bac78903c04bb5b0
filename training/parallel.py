"""Several processes train one network, each on its share of every batch: `torchrun --module training COMMAND`.

Each has the recipe's batch size, so that two of them make the steps of one with the double batch: the same images with
the same augmentations, the gradient of the mean loss, and batch norms over all of it. CutMix and attacks draw for each
process anew. The learning rate stays the recipe's. The first process alone writes. Without torchrun there is one, and
nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as distributed
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Group:
    """This process among those that train together."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    @property
    def path(self) -> tuple[int | str, ...]:
        """What tells its draws from those of the others, for `models.randomness`; nothing where it is alone."""
        return () if self.size == 1 else ("process", self.rank)

    def share(self, batch: Tensor) -> Tensor:
        """Its part of a batch (N, ...) of all."""
        return batch if self.size == 1 else batch.tensor_split(self.size)[self.rank]


def group() -> Group:
    """As torchrun has told; alone otherwise."""
    if not distributed.is_initialized():
        return Group(0, 1)
    return Group(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """The device of this process, which is in the group that torchrun has made, if it has, until the block ends."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def train_together(holders: Iterable[object]) -> None:
    """Let the optimizers among `holders` step along the mean gradient, and their batch norms see all shares."""
    if group().size == 1:
        return
    for holder in holders:
        if isinstance(holder, torch.optim.Optimizer):
            holder.register_step_pre_hook(lambda optimizer, *_: _average_gradients(optimizer))
        elif isinstance(holder, nn.Module):
            for module in holder.modules():
                if isinstance(module, _BatchNorm):
                    module.__class__ = _shared(type(module))


def average(metrics: Mapping[str, float]) -> dict[str, float]:
    """The means over all processes, each of which must call it; `metrics` themselves where there is one."""
    if group().size == 1:
        return dict(metrics)
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=_device())
    distributed.all_reduce(values)
    return dict(zip(metrics, (values / group().size).tolist(), strict=True))


def wait_for_all() -> None:
    """Until every process is here."""
    if group().size > 1:
        distributed.barrier()


def _device() -> torch.device:
    is_cuda = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")


def _average_gradients(optimizer: torch.optim.Optimizer) -> None:
    parameters = [parameter for each in optimizer.param_groups for parameter in each["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= group().size
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class _Shared(_BatchNorm):
    """Batch norm whose statistics, in training, are those of all processes' shares together (Ioffe & Szegedy, 2015).

    torch's own SyncBatchNorm does this on GPUs alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        images = input.float()
        others = [dimension for dimension in range(images.dim()) if dimension != 1]
        count = images.new_full((1,), images.numel() / images.shape[1])
        sums = differentiable.all_reduce(torch.cat([images.sum(others), images.square().sum(others), count]))
        total, squares, seen = sums.split([images.shape[1], images.shape[1], 1])
        mean = total / seen
        variance = (squares / seen - mean.square()).clamp(min=0)
        self._remember(mean.detach(), variance.detach() * seen.detach() / (seen.detach() - 1))
        shape = [1, -1] + [1] * (images.dim() - 2)
        normal = (images - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        normalized: Tensor = normal.to(input.dtype)
        return normalized

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as plain batch norms do."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance, factor)


_kinds: dict[type[_BatchNorm], type[_BatchNorm]] = {}


def _shared(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """A kind of batch norm, with shared statistics."""
    if issubclass(kind, _Shared):
        return kind
    if kind not in _kinds:
        _kinds[kind] = type(f"Shared{kind.__name__}", (_Shared, kind), {})
    return _kinds[kind]

"""Networks as finished runs left them, frozen and in eval mode.

Every function raises RunError for a run that is missing or not finished.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from models.aid import AidDiscriminator
from models.atop import build_inpainter
from models.classifiers import Classifier, build_classifier
from models.manifest import AidSpec, AnyInpainterSpec, InpainterSpec, MaeSpec
from training.data import DataError, ImageSet
from training.runs import Checkpoint, read_checkpoint, read_recipe_of, read_summary_of

AVERAGE_PREFIX = "module."
"""In front of the names of an average's weights (see `torch.optim.swa_utils.AveragedModel`)."""

Network = TypeVar("Network", bound=nn.Module)


def on_device(network: Network, device: torch.device) -> Network:
    """The network on `device`, channels last."""
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    return network


def frozen(network: Network, device: torch.device) -> Network:
    """The network on `device`, in eval mode, channels last, none of its weights asking for a gradient."""
    return on_device(network, device).eval().requires_grad_(False)


def averaged(runs: Path, name: str) -> dict[str, Tensor]:
    """The average of the weights that a run kept."""
    state = read_checkpoint(runs, name)["average"]
    return {key.removeprefix(AVERAGE_PREFIX): value for key, value in state.items() if key.startswith(AVERAGE_PREFIX)}


def as_average(network: nn.Module) -> Checkpoint:
    """The weights of a network where `averaged` finds them."""
    return {"average": {AVERAGE_PREFIX + key: value for key, value in network.state_dict().items()}}


def trained_classifier(runs: Path, name: str, device: torch.device) -> Classifier:
    """The averaged classifier of a `train-classifier` run."""
    recipe, state = read_recipe_of(runs, name), averaged(runs, name)
    classifier = build_classifier(
        recipe["architecture"],
        num_classes=len(read_summary_of(runs, name)["classes"]),
        input_size=recipe["data"]["input_size"],
        mirrored=recipe["mirrored"],
    )
    classifier.load_state_dict(state)  # mean and deviation are buffers and come with the weights
    return frozen(classifier, device)


def refuse_other_data(runs: Path, name: str, data: ImageSet) -> None:
    """Raise DataError unless `data` has the classes and the size that a `train-classifier` run was for."""
    classes, size = read_summary_of(runs, name)["classes"], read_recipe_of(runs, name)["data"]["input_size"]
    if list(data.classes) != classes or tuple(data.images.shape[2:]) != (size, size):
        raise DataError(f"run {name} was trained for other classes, or another data.input_size, than these data have")


def trained_inpainter(runs: Path, name: str, device: torch.device) -> nn.Module:
    """The averaged in-painter of a `pretrain-purifier` or `finetune-atop` run."""
    any_inpainter = TypeAdapter[InpainterSpec | MaeSpec](AnyInpainterSpec)
    inpainter = build_inpainter(any_inpainter.validate_python(read_recipe_of(runs, name)["inpainter"]))
    inpainter.load_state_dict(averaged(runs, name))
    return frozen(inpainter, device)


def trained_discriminator(runs: Path, name: str, device: torch.device) -> tuple[AidDiscriminator, AidSpec]:
    """The discriminator of a `train-aid` run and what it was built from."""
    spec = AidSpec(**read_recipe_of(runs, name)["discriminator"])
    state = read_checkpoint(runs, name)["discriminator"]
    channels = [state[f"encoders.{index}.0.weight"].shape[1] for index in range(len(spec.taps))]
    discriminator = AidDiscriminator(spec, channels)
    discriminator.load_state_dict(state)
    return frozen(discriminator, device), spec

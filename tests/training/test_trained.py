from __future__ import annotations

import torch

from tests.fakes import weight_of
from tests.training.tiny import Workshop, color_set
from training.data import to_float
from training.runs import read_checkpoint, read_summary_of
from training.train_classifier import accuracy_on
from training.trained import averaged, frozen, trained_classifier, trained_discriminator, trained_inpainter

CPU = torch.device("cpu")


def test_a_frozen_network_asks_for_no_gradient_and_is_in_eval_mode() -> None:
    network = frozen(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Dropout()), CPU)
    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())
    weight = next(network.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_classifier_is_the_averaged_one_with_its_own_normalization(finished: Workshop) -> None:
    classifier = trained_classifier(finished.runs, "classifier", CPU)

    saved = read_checkpoint(finished.runs, "classifier")
    head = weight_of(classifier, "stages.head.weight")
    assert torch.equal(head, saved["average"]["module.stages.head.weight"])
    assert not torch.equal(head, saved["classifier"]["stages.head.weight"])
    assert classifier.normalize.mean.flatten().min() > 0
    accuracy = accuracy_on(classifier, color_set(24, seed=1), CPU)
    assert accuracy == read_summary_of(finished.runs, "classifier")["test_accuracy"]


def test_the_average_has_the_names_of_the_network(finished: Workshop) -> None:
    state = averaged(finished.runs, "purifier")
    assert state.keys() == read_checkpoint(finished.runs, "purifier")["inpainter"].keys()


def test_the_in_painter_is_the_averaged_one(finished: Workshop) -> None:
    inpainter = trained_inpainter(finished.runs, "atop", CPU)
    state = inpainter.state_dict()
    assert torch.equal(state["entry.weight"], averaged(finished.runs, "atop")["entry.weight"])
    assert not torch.equal(state["entry.weight"], averaged(finished.runs, "purifier")["entry.weight"])


def test_the_discriminator_comes_with_what_it_was_built_from(finished: Workshop) -> None:
    discriminator, spec = trained_discriminator(finished.runs, "aid", CPU)
    assert spec.taps == ("stage1", "stage3")
    assert spec.width == 16
    classifier = trained_classifier(finished.runs, "classifier", CPU)
    features = classifier.features(to_float(color_set(4).images, CPU), spec.taps)
    scores = discriminator([tap.mean((2, 3)) for tap in features]).sigmoid()
    assert scores.shape == (4,)
    assert not discriminator.training

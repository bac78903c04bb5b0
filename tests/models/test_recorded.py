"""A recorded function gives the very bits of the function, or is not recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from models.aid import AidPurifier
from models.classifiers import Classifier, MirroredClassifier
from models.gradients import input_gradient
from models.manifest import AidPreset
from models.packed import packed_twin
from models.recorded import MAX_RECORDINGS, Recorded, record_forward
from models.zeropur import ZeroPurPurifier
from tests.networks import SIZE, tiny_aid, tiny_classifier, zeropur_preset


def image(seed: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def residual_classifier(kind: type[Classifier] = Classifier) -> Classifier:
    """Batch norm, max pooling, a skip and an odd size: what the shipped networks are made of."""
    torch.manual_seed(3)
    stages: dict[str, nn.Module] = {
        "stage1": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(3), nn.BatchNorm2d(8), nn.GELU()),
        "stage2": nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()),
        "pool": nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        "head": nn.Linear(8, 4),
    }
    classifier = kind(stages, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    classifier.train()(image(9, 8))  # running statistics that are not the initial ones
    return packed_twin(classifier.eval().requires_grad_(False))


class Calls:
    """How often a module of `network` ran."""

    def __init__(self, network: nn.Module) -> None:
        self.count = 0
        for module in network.modules():
            module.register_forward_hook(self._note)

    def _note(self, *_: object) -> None:
        self.count += 1


@pytest.mark.parametrize("kind", [Classifier, MirroredClassifier])
def test_answers_have_the_same_bits_and_no_module_runs(kind: type[Classifier]) -> None:
    classifier = residual_classifier(kind)
    expected = [classifier(image(seed)) for seed in range(4)]
    recorded = Recorded(classifier, classifier.forward)
    recorded(image(7))
    calls = Calls(classifier)
    for seed in range(4):
        assert torch.equal(recorded(image(seed)), expected[seed])
    assert calls.count == 0


@pytest.mark.parametrize("kind", [Classifier, MirroredClassifier])
def test_gradients_have_the_same_bits_and_no_module_runs(kind: type[Classifier]) -> None:
    classifier = residual_classifier(kind)

    def gradient(images: Tensor, *weights: Tensor) -> Tensor:
        return input_gradient(lambda x: classifier.features(x, ["stage1", "stage2"]), images, weights)

    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(100 + seed)
        features = classifier.features(image(seed), ["stage1", "stage2"])
        return [image(seed), *(torch.randn(feature.shape, generator=generator) for feature in features)]

    arguments = [inputs(seed) for seed in range(4)]
    expected = [gradient(*each) for each in arguments]
    recorded = Recorded(classifier, gradient)
    recorded(*inputs(7))
    calls = Calls(classifier)
    for each, wanted in zip(arguments, expected, strict=True):
        assert torch.equal(recorded(*each), wanted)
    assert calls.count == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"perceptual_weight": 1.0},
        {"momentum": 0.0},
        {"blur": {"kind": "median", "size": 3}},
        {"random_start": True},
    ],
)
def test_zeropur_is_recorded_and_its_images_have_the_same_bits(changes: dict[str, object]) -> None:
    classifier, preset = tiny_classifier(), zeropur_preset(coarse_steps=3, fine_steps=4, **changes)
    purifier, plain = ZeroPurPurifier(classifier, preset), ZeroPurPurifier(classifier, preset)
    plain._ascent, plain._alignment = plain._ascent._function, plain._alignment._function  # type: ignore[assignment]
    purifier(image(5), [5])
    for seed in range(3):
        assert torch.equal(purifier(image(seed), [seed]), plain(image(seed), [seed]))
    calls = Calls(classifier)
    purifier(image(6), [6])
    passes = calls.count
    calls.count = 0
    classifier.features(image(6), preset.fine_layers)
    assert passes == 2 * calls.count  # those of the received and of the coarse image: no step runs a module


def test_aid_is_recorded_and_its_images_have_the_same_bits() -> None:
    aid = tiny_aid(tiny_classifier()).eval()
    purifier = AidPurifier(aid, AidPreset(steps=5))
    expected = [purifier(torch.cat([image(seed)] * 2), [seed] * 2)[:1] for seed in range(3)]  # batches are not recorded
    purifier(image(5), [5])
    calls = Calls(aid)
    for seed in range(3):
        torch.testing.assert_close(purifier(image(seed), [seed]), expected[seed])
    assert calls.count == 0


def runs_modules(recorded: Callable[..., object], network: nn.Module, *inputs: Tensor) -> bool:
    recorded(*inputs)
    calls = Calls(network)
    recorded(*inputs)
    return calls.count > 0


def test_batches_and_networks_in_training_run_as_ever() -> None:
    classifier = residual_classifier()
    recorded = Recorded(classifier, classifier.forward)
    assert not runs_modules(recorded, classifier, image(0))
    assert runs_modules(recorded, classifier, image(0, count=2))
    classifier.train()
    assert runs_modules(recorded, classifier, image(0))


def test_a_wanted_gradient_is_there() -> None:
    classifier = residual_classifier()
    recorded = Recorded(classifier, classifier.forward)
    recorded(image(0))
    images = image(0).requires_grad_()
    (gradient,) = torch.autograd.grad(recorded(images).sum(), images)
    assert float(gradient.abs().max()) > 0
    with torch.no_grad():
        assert not recorded(images).requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func's own import
def test_tangents_and_functional_gradients_are_carried_on() -> None:
    classifier = residual_classifier()
    recorded = Recorded(classifier, classifier.forward)
    recorded(image(0))
    with forward_ad.dual_level():
        answer = recorded(forward_ad.make_dual(image(0), image(1)))
        assert forward_ad.unpack_dual(answer).tangent is not None
    gradient = torch.func.grad(lambda images: recorded(images).sum())(image(0))
    assert float(gradient.abs().max()) > 0


def test_changed_weights_are_noticed() -> None:
    classifier = residual_classifier()
    recorded = Recorded(classifier, classifier.forward)
    before = recorded(image(0))
    with torch.no_grad():
        for tensor in classifier.parameters():
            tensor.mul_(1.5)
    assert torch.equal(recorded(image(0)), classifier(image(0)))
    assert not torch.equal(recorded(image(0)), before)


def test_a_course_that_depends_on_the_image_is_not_recorded() -> None:
    class Branching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images + 1 if bool(images.mean() > 0.5) else images - 1

    recorded = Recorded(Branching().eval(), Branching().forward)
    for level in (0.9, 0.1, 0.9):
        images = torch.full((1, 3, 2, 2), level)
        torch.testing.assert_close(recorded(images), images + 1 if level > 0.5 else images - 1)


def test_a_size_that_depends_on_the_image_is_not_recorded() -> None:
    recorded = Recorded(nn.Identity().eval(), lambda images: images[images > 0.5].sum())
    for seed in range(3):
        assert torch.equal(recorded(image(seed)), image(seed)[image(seed) > 0.5].sum())


def test_draws_are_not_recorded() -> None:
    recorded = Recorded(nn.Identity().eval(), lambda images: images + torch.rand_like(images))
    recorded(image(0))
    assert not torch.equal(recorded(image(0)), recorded(image(0)))


def test_a_constant_of_the_first_image_is_not_recorded() -> None:
    """Numbers that left the tensors on the way would be the first image's for ever."""
    recorded = Recorded(nn.Identity().eval(), lambda images: images * images.mean().item())
    recorded(image(0))
    assert torch.equal(recorded(image(1)), image(1) * image(1).mean().item())


def test_a_first_image_with_nan_does_not_keep_others_from_being_recorded() -> None:
    classifier = residual_classifier()
    recorded = Recorded(classifier, classifier.forward)
    assert not runs_modules(recorded, classifier, image(0) * torch.nan)


def test_each_layout_is_recorded_and_few_are_kept() -> None:
    classifier = residual_classifier()
    recorded = Recorded(classifier, classifier.forward)
    for side in range(SIZE, SIZE + MAX_RECORDINGS + 3):
        for layout in (torch.contiguous_format, torch.channels_last):
            images = torch.rand(1, 3, side, side).to(memory_format=layout)
            recorded(images)
            assert torch.equal(recorded(images), classifier(images))
    assert len(recorded._recordings) == MAX_RECORDINGS


def test_a_copy_records_its_own_network() -> None:
    classifier = record_forward(residual_classifier())
    classifier(image(0))
    twin = copy.deepcopy(classifier)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.mul_(1.5)
    assert not torch.equal(twin(image(0)), classifier(image(0)))
    assert torch.equal(twin(image(0)), twin(image(0, 1)))
    del classifier
    twin(image(1))


def test_an_inpainter_of_several_outputs_is_recorded() -> None:
    class TwoStages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            coarse = self.conv(images * (1 - mask))
            return coarse, coarse + images

    network = TwoStages().eval().requires_grad_(False)
    expected = network(image(0), image(1)[:, :1])
    recorded = Recorded(network, network.forward)
    recorded(image(3), image(4)[:, :1])
    calls = Calls(network)
    answer = recorded(image(0), image(1)[:, :1])
    assert calls.count == 0
    assert all(map(torch.equal, answer, expected))

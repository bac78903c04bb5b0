"""A recorded function gives the very bits of the function, or is not recorded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from models.aid import AidPurifier
from models.classifiers import AdoptedClassifier, Classifier, MirroredClassifier
from models.gradients import input_gradient
from models.manifest import AidPreset
from models.packed import packed_twin
from models.recorded import MAX_RECORDINGS, Recorded, record_forward, same_bits
from models.unet import UNet
from models.zeropur import ZeroPurPurifier
from tests.networks import SIZE, tiny_aid, tiny_bundle, tiny_classifier, with_auto, zeropur_preset


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
    recorded = Recorded(classifier.forward)
    recorded(image(7))
    calls = Calls(classifier)
    assert all(same_bits(recorded(image(seed)), expected[seed]) for seed in range(4))
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
    recorded = Recorded(gradient)
    recorded(*inputs(7))
    calls = Calls(classifier)
    assert all(same_bits(recorded(*each), wanted) for each, wanted in zip(arguments, expected, strict=True))
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
def test_a_recorded_zeropur_gives_images_of_the_same_bits(changes: dict[str, object]) -> None:
    classifier, preset = tiny_classifier(), zeropur_preset(coarse_steps=3, fine_steps=4, **changes)
    recorded, plain = ZeroPurPurifier(classifier, preset), ZeroPurPurifier(classifier, preset)
    recorded.record()
    recorded(image(5), [5])
    assert all(same_bits(recorded(image(seed), [seed]), plain(image(seed), [seed])) for seed in range(3))
    calls = Calls(classifier)
    recorded(image(6), [6])
    passes, calls.count = calls.count, 0
    classifier.features(image(6), preset.fine_layers)
    assert passes == 2 * calls.count  # those of the received and of the coarse image: no step runs a module


def test_a_recorded_aid_gives_images_of_the_same_bits() -> None:
    aid = tiny_aid(tiny_classifier()).eval()
    recorded, plain = AidPurifier(aid, AidPreset(steps=5)), AidPurifier(aid, AidPreset(steps=5))
    recorded.record()
    recorded(image(5), [5])
    assert all(same_bits(recorded(image(seed), [seed]), plain(image(seed), [seed])) for seed in range(3))
    calls = Calls(aid)
    recorded(image(6), [6])
    assert calls.count == 0


def test_a_recorded_inpainter_gives_images_of_the_same_bits() -> None:
    torch.manual_seed(0)
    network = UNet(width=4).eval().requires_grad_(False)
    torch.nn.init.normal_(network.exit.weight)
    mask = (image(8)[:, :1] > 0.5).float()
    expected = network(image(0), mask)
    recorded = Recorded(network.forward)
    recorded(image(3), 1 - mask)
    calls = Calls(network)
    assert same_bits(recorded(image(0), mask), expected)
    assert calls.count == 0


@pytest.mark.parametrize("defense", ["none", "atop", "aid", "zeropur", "atop,aid", "auto"])
def test_what_a_recorded_bundle_hands_out_is_in_eval_mode_to_the_last_layer(defense: str) -> None:
    bundle = with_auto(tiny_bundle(), 0.5)
    bundle.record()
    handed_out = [bundle.defended(defense), bundle._decided(defense, image(0), 1, 0, bundle.ran(defense, image(0)))]
    assert not [module for defended in handed_out for module in defended.modules() if module.training]


@pytest.mark.parametrize("defense", ["none", "atop", "aid", "zeropur", "atop,aid", "auto"])
def test_a_bundle_records_when_it_is_told_to(defense: str) -> None:
    plain, recorded = with_auto(tiny_bundle(), 0.5), with_auto(tiny_bundle(), 0.5)
    recorded.record()
    recorded.record()
    for seed in range(3):
        answers = [bundle.probabilities(defense, image(seed), seed=seed) for bundle in (plain, recorded)]
        assert same_bits(*answers)
        assert same_bits(plain.aid_score(image(seed)), recorded.aid_score(image(seed)))
    for bundle in (plain, recorded):
        calls = Calls(bundle._classifier_twin.stages)
        bundle.probabilities("none", image(4))
        bundle.aid_score(image(4))
        assert (calls.count > 0) == (bundle is plain)


class Counted:
    """A function and how often it was called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *inputs: Tensor, **named: Any) -> Any:
        self.calls += 1
        return self.function(*inputs, **named)


def is_recorded(function: Callable[..., Any], *inputs: Tensor) -> bool:
    """Whether a recording answers for `inputs`, once there is one."""
    counted = Counted(function)
    recorded = Recorded(counted)
    recorded(*inputs)
    before = counted.calls
    recorded(*inputs)
    return counted.calls == before


def test_only_single_images_are_recorded() -> None:
    classifier = residual_classifier()
    assert is_recorded(classifier.forward, image(0))
    assert not is_recorded(classifier.forward, image(0, count=2))


@pytest.mark.parametrize(
    "function",
    [
        lambda images: images * images.mean().item(),
        lambda images: images * images.mean().tolist(),
        lambda images: images * float(images.mean().numpy()),
        lambda images: images + 1 if bool(images.mean() > 0.5) else images - 1,
        lambda images: images * len((images > 0.5).nonzero()),
        lambda images: images * images[images > 0.5].numel(),
        lambda images: images * len((images >= 0).nonzero()),
        lambda images: images * (1.0 if images.min().tolist() >= 0 else -1.0),
        lambda images: images[images > 0.5].sum(),
        lambda images: images + torch.rand_like(images),
        lambda images: F.dropout(images, 0.5),
        lambda images: (images, None),
        lambda images: (images, 0.5),
    ],
    ids=[
        "item",
        "list",
        "array",
        "branch",
        "length",
        "size",
        "usual length",
        "usual branch",
        "mask",
        "draw",
        "dropout",
        "none",
        "float",
    ],
)
@pytest.mark.parametrize("first", [0.0, 0.7])
def test_what_depends_on_the_image_is_not_recorded(function: Callable[[Tensor], Any], first: float) -> None:
    recorded = Recorded(function)
    recorded(torch.full((1, 3, 5, 5), first))  # a warm-up has an image of zeros
    for seed in range(3):
        torch.manual_seed(seed)
        answer = recorded(image(seed))
        torch.manual_seed(seed)
        assert str(answer) == str(function(image(seed)))
    assert not is_recorded(function, image(0))


def test_draws_differ_from_call_to_call() -> None:
    recorded = Recorded(lambda images: images + torch.rand_like(images))
    recorded(image(0))
    assert not torch.equal(recorded(image(0)), recorded(image(0)))


def test_a_recording_that_fails_takes_no_answer_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no recording today")

    monkeypatch.setattr("models.recorded.make_fx", fail)
    classifier = residual_classifier()
    recorded = Recorded(classifier.forward)
    assert all(same_bits(recorded(image(seed)), classifier(image(seed))) for seed in (0, 0, 1))


def test_a_wanted_gradient_is_there() -> None:
    classifier = residual_classifier()
    recorded = Recorded(classifier.forward)
    recorded(image(0))
    images = image(0).requires_grad_()
    (gradient,) = torch.autograd.grad(recorded(images).sum(), images)
    assert float(gradient.abs().max()) > 0
    with torch.no_grad():
        assert not recorded(images).requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func's own import
def test_tangents_and_functional_gradients_are_carried_on() -> None:
    classifier = residual_classifier()
    recorded = Recorded(classifier.forward)
    recorded(image(0))
    with forward_ad.dual_level():
        answer = recorded(forward_ad.make_dual(image(0), image(1)))
        assert forward_ad.unpack_dual(answer).tangent is not None
    gradient = torch.func.grad(lambda images: recorded(images).sum())(image(0))
    assert float(gradient.abs().max()) > 0


def test_other_modes_run_as_ever() -> None:
    classifier = residual_classifier()
    recorded = Recorded(classifier.forward)
    recorded(image(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(recorded(image(1)), classifier(image(1)))
        assert recorded(image(1)).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(recorded(image(1)), classifier(image(1)))
    counted = Counted(classifier.forward)
    watched = Recorded(counted)
    watched(image(0))
    before = counted.calls
    with FlopCounterMode(display=False) as flops:
        watched(image(0))
    assert counted.calls == before + 1
    assert flops.get_total_flops() > 0
    assert same_bits(watched(images=image(1)), classifier(image(1)))


def test_a_first_image_with_nan_does_not_keep_others_from_being_recorded() -> None:
    assert is_recorded(residual_classifier().forward, image(0) * torch.nan)


def test_few_kinds_are_recorded_and_the_others_run_as_ever() -> None:
    classifier = residual_classifier()
    counted = Counted(classifier.forward)
    recorded = Recorded(counted)
    kinds = [
        torch.rand(1, 3, side, side).to(memory_format=layout)
        for side in range(SIZE, SIZE + MAX_RECORDINGS)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    for images in kinds:
        recorded(images)
    before = counted.calls
    assert all(same_bits(recorded(images), classifier(images)) for images in kinds)
    assert counted.calls - before == len(kinds) - MAX_RECORDINGS


def test_threads_share_a_recording() -> None:
    classifier = residual_classifier()
    counted = Counted(classifier.forward)
    expected = classifier(image(0))
    recorded = Recorded(counted)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: recorded(image(0)), range(32)))
    assert all(same_bits(answer, expected) for answer in answers)
    before = counted.calls
    recorded(image(0))
    assert counted.calls == before


def test_copies_record_their_own_network() -> None:
    classifier = record_forward(residual_classifier())
    classifier(image(0))
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        with torch.no_grad():
            for tensor in twin.parameters():
                tensor.mul_(1.5)
        twin(image(0))
        assert not torch.equal(twin(image(0)), classifier(image(0)))
        assert same_bits(twin(image(0)), twin(image(0, count=2)[:1]))


def test_same_bits_sees_every_difference() -> None:
    zeros = torch.zeros(2, 3)
    assert same_bits((zeros, zeros * torch.nan), (zeros.clone(), zeros * torch.nan))
    others = [-zeros, torch.zeros(1, 3), zeros.double(), torch.zeros(3, 2).T, zeros * torch.nan, (zeros,), None]
    assert not any(same_bits(zeros, other) for other in others)


def test_a_users_network_that_works_in_place_is_recorded() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    classifier = AdoptedClassifier(network, {"stage1": "0", "stage2": "2", "pool": "5"}).eval().requires_grad_(False)
    preset = zeropur_preset(coarse_steps=2, fine_steps=3)
    recorded, plain = ZeroPurPurifier(classifier, preset), ZeroPurPurifier(classifier, preset)
    recorded.record()
    recorded(image(5), [5])
    assert all(same_bits(recorded(image(seed), [seed]), plain(image(seed), [seed])) for seed in range(3))
    assert is_recorded(classifier.forward, image(0))
    assert is_recorded(plain._similarity_gradient, image(0), image(1))

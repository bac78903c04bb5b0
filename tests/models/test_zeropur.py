from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.blur import blur
from models.classifiers import Classifier
from models.manifest import ZeroPurPreset
from models.zeropur import ZeroPurPurifier, l1_normalized, lpips_features
from tests.networks import SIZE, tiny_classifier, zeropur_preset


@pytest.fixture
def images() -> Tensor:
    return 0.2 + 0.6 * torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def published(classifier: Classifier, received: Tensor, preset: ZeroPurPreset) -> Tensor:
    """Both algorithms step by step as they are printed (misprints corrected), every pass made whole and anew."""

    def layer(batch: Tensor, name: str) -> Tensor:
        outputs = dict[str, Tensor]()
        features = classifier.normalize(batch)
        for stage_name, stage in classifier.stages.items():
            features = outputs[stage_name] = stage(features)
        return outputs[name]

    def project(batch: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(batch, received - preset.eps), received + preset.eps).clamp(0, 1)

    shifted, previous = received.clone(), torch.zeros_like(received)
    for _ in range(preset.coarse_steps):
        blurred = blur(shifted, preset.blur).detach()
        shifted.requires_grad_()
        similarity = torch.zeros(())
        for name in preset.coarse_layers or ("pool",):
            target = layer(blurred, name).detach().flatten(1)
            similarity = similarity + F.cosine_similarity(layer(shifted, name).flatten(1), target).sum()
        (gradient,) = torch.autograd.grad(similarity, shifted)
        if preset.momentum:
            previous = gradient / gradient.abs().sum((1, 2, 3), keepdim=True) + preset.momentum * previous
            gradient = previous
        shifted = project(shifted.detach() + preset.coarse_step_size * gradient.sign())

    aligned = received.clone()
    for _ in range(preset.fine_steps):
        aligned.requires_grad_()
        loss = torch.zeros(())
        for name in preset.fine_layers:
            original = layer(received, name).detach()
            direction = layer(shifted, name).detach() - original
            if preset.perceptual_weight:
                squares = direction.square().sum((1, 2, 3), keepdim=True)
                direction = preset.projection_weight * direction / squares
            loss = loss - ((layer(aligned, name) - original) * direction).sum()
        if preset.perceptual_weight and not torch.equal(aligned, received):
            now, before = ([layer(x, name) for name in preset.fine_layers] for x in (aligned, received))
            distance = (lpips_features(now) - lpips_features(before).detach()).norm(dim=1)
            loss = loss + preset.perceptual_weight * distance.sum()
        (gradient,) = torch.autograd.grad(loss, aligned)
        aligned = project(aligned.detach() - preset.fine_step_size * gradient.sign())
    return aligned if preset.fine_steps else shifted


@pytest.mark.parametrize(
    "changes",
    [
        {"coarse_steps": 2, "fine_steps": 3},
        {"coarse_steps": 3, "fine_steps": 0},
        {"coarse_steps": 2, "fine_steps": 2, "momentum": 0.0, "fine_layers": ("stage1", "stage2", "pool")},
        {"coarse_steps": 2, "fine_steps": 4, "perceptual_weight": 1.0, "projection_weight": 0.05},
        {"coarse_steps": 2, "fine_steps": 3, "blur": {"kind": "tv", "size": 0.1}},
        {"coarse_steps": 3, "fine_steps": 0, "coarse_layers": ("stage2", "pool")},
        {"coarse_steps": 2, "fine_steps": 2, "coarse_layers": ("stage1", "stage2")},
    ],
)
def test_it_does_what_the_algorithms_say(images: Tensor, changes: dict[str, object]) -> None:
    classifier, preset = tiny_classifier(), zeropur_preset(**changes)

    ours = ZeroPurPurifier(classifier, preset)(images, range(4))

    theirs = published(classifier, images, preset)
    assert float((ours != images).float().mean()) > 0.9
    # A sign can differ where a gradient is zero to rounding; that is a step at single pixels.
    assert float(((ours - theirs).abs() > 1e-6).float().mean()) < 0.005


def test_coarse_shifting_turns_the_embedding_towards_that_of_the_blurred_image(images: Tensor) -> None:
    classifier, preset = tiny_classifier(), zeropur_preset(coarse_step_size=0.1 / 255, coarse_steps=1)

    def similarity(batch: Tensor) -> Tensor:
        return F.cosine_similarity(classifier.embedding(batch), classifier.embedding(blur(images, preset.blur)))

    shifted = ZeroPurPurifier(classifier, preset).coarse_shifting(images, range(4))

    assert bool((similarity(shifted) > similarity(images)).all())


def test_fine_alignment_moves_the_features_along_the_coarse_direction(images: Tensor) -> None:
    classifier, preset = tiny_classifier(), zeropur_preset(fine_steps=20)
    purifier = ZeroPurPurifier(classifier, preset)
    coarse = purifier.coarse_shifting(images, range(4))
    aligned = purifier.fine_alignment(images, coarse)

    def projection(batch: Tensor) -> Tensor:
        original = classifier.features(images, preset.fine_layers)
        return sum(  # type: ignore[return-value]
            ((b - o) * (c - o)).flatten(1).sum(1)
            for b, c, o in zip(
                classifier.features(batch, preset.fine_layers),
                classifier.features(coarse, preset.fine_layers),
                original,
                strict=True,
            )
        )

    assert bool((projection(aligned) > 0).all())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"random_start": True},
        {"perceptual_weight": 1.0},
        {"fine_steps": 0},
        {"blur": {"kind": "tv", "size": 0.1}},
    ],
)
def test_every_preset_stays_in_its_ball_and_range(changes: dict[str, object]) -> None:
    preset = zeropur_preset(eps=0.02, **changes)
    images = torch.rand(3, 3, SIZE, SIZE)

    purified = ZeroPurPurifier(tiny_classifier(), preset)(images, range(3))

    assert float((purified - images).abs().max()) <= 0.02 + 1e-6
    assert bool(((purified >= 0) & (purified <= 1)).all())


def test_without_any_step_its_blur_is_left_with_the_blurs_own_gradient(images: Tensor) -> None:
    preset = zeropur_preset(coarse_steps=0, fine_steps=0)
    moving = images.clone().requires_grad_()
    purified = ZeroPurPurifier(tiny_classifier(), preset)(moving, range(4))
    assert torch.equal(purified, blur(images, preset.blur))

    (gradient,) = torch.autograd.grad(purified[..., 0, 0].sum(), moving)
    assert bool((gradient[..., 0, 1] != 0).all())  # not the identity


def test_a_random_start_follows_the_seed_and_otherwise_nothing_does(images: Tensor) -> None:
    def purify(seeds: list[int], **changes: object) -> Tensor:
        purified: Tensor = ZeroPurPurifier(tiny_classifier(), zeropur_preset(**changes))(images[:1], seeds)
        return purified

    assert torch.equal(purify([1], random_start=True), purify([1], random_start=True))
    assert not torch.equal(purify([1], random_start=True), purify([2], random_start=True))
    assert torch.equal(purify([1]), purify([2]))


def test_the_perceptual_term_keeps_the_features_closer_to_the_received_image(images: Tensor) -> None:
    classifier = tiny_classifier()

    def distance(weight: float) -> Tensor:
        preset = zeropur_preset(perceptual_weight=weight, projection_weight=1e-4, fine_steps=20)
        aligned = ZeroPurPurifier(classifier, preset)(images, range(4))
        layers = preset.fine_layers
        moved = lpips_features(classifier.features(aligned, layers))
        distances: Tensor = (moved - lpips_features(classifier.features(images, layers))).norm(dim=1)
        return distances

    assert bool((distance(1.0) < distance(1e-9)).all())


def test_work_is_not_done_twice(images: Tensor) -> None:
    classifier, preset = tiny_classifier(), zeropur_preset(coarse_steps=3, fine_steps=5)
    seen = dict.fromkeys(classifier.feature_names, 0)
    for name, stage in classifier.stages.items():

        def count(_: object, inputs: tuple[Tensor], __: object, name: str = name) -> None:
            seen[name] += len(inputs[0])

        stage.register_forward_hook(count)

    ZeroPurPurifier(classifier, preset)(images, range(4))

    # Coarse: the image and its blurred copy at each step. Fine: the coarse image, and the aligned one at each step,
    # of which the first is the image that was received.
    passes = {name: count / len(images) for name, count in seen.items()}
    assert passes == {"stage1": 2 * 3 + 1 + 5, "stage2": 2 * 3 + 1 + 5, "pool": 2 * 3, "head": 0}


def test_no_gradient_reaches_a_weight_and_none_is_needed_around(images: Tensor) -> None:
    classifier = tiny_classifier().requires_grad_(True)

    with torch.no_grad():
        purified = ZeroPurPurifier(classifier, zeropur_preset())(images, range(4))

    assert not purified.requires_grad
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_an_image_does_not_depend_on_its_neighbors(images: Tensor) -> None:
    purifier = ZeroPurPurifier(tiny_classifier(), zeropur_preset())

    together, alone = purifier(images, range(4)), purifier(images[2:3], [0])

    assert float((together[2:3] - alone).abs().mean()) < 1e-4


def test_the_attacker_s_gradient_is_the_identity(images: Tensor) -> None:
    images.requires_grad_()

    ZeroPurPurifier(tiny_classifier(), zeropur_preset())(images, range(4)).sum().backward()

    assert images.grad is not None
    assert torch.equal(images.grad, torch.ones_like(images))


def test_a_zero_gradient_stays_zero() -> None:
    zero = torch.zeros(2, 3, 4, 4)

    assert torch.equal(l1_normalized(zero), zero)


def test_lpips_features_are_unit_vectors_over_channels_divided_by_the_root_of_the_area() -> None:
    features = [torch.rand(2, 5, 3, 4), torch.rand(2, 7, 2, 2)]

    joined = lpips_features(features)

    assert joined.shape == (2, 5 * 12 + 7 * 4)
    first = features[0] / features[0].norm(dim=1, keepdim=True) / 12**0.5
    assert torch.allclose(joined[:, :60], first.flatten(1), atol=1e-6)
    assert torch.allclose(joined.norm(dim=1), torch.full((2,), 2**0.5), atol=1e-5)

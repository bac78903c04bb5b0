from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from models.classifiers import ARCHITECTURES, AdoptedClassifier, Classifier, MirroredClassifier, build_classifier

QUICK = ["resnet18", "wrn-16-2", "vgg19", "resnet9-half", "speednet"]


@pytest.fixture(autouse=True)
def fixed_weights_and_images() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Counted(nn.Module):
    """A stage that counts its calls."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage
        self.calls = 0

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.stage(features)
        return result


def counted_stages() -> dict[str, Counted]:
    return {
        "stem": Counted(nn.Conv2d(3, 4, 3, padding=1)),
        "stage1": Counted(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1))),
        "pool": Counted(nn.AdaptiveAvgPool2d(1)),
        "head": Counted(nn.Sequential(nn.Flatten(), nn.Linear(5, 3))),
    }


def calls(stages: dict[str, Counted]) -> list[int]:
    return [stage.calls for stage in stages.values()]


def test_logits_are_the_stages_applied_one_after_the_other_to_normalized_images() -> None:
    stages = counted_stages()
    images = torch.rand(2, 3, 8, 8)
    classifier = Classifier(stages, mean=(0.5, 0.25, 0.0), std=(0.5, 2.0, 0.1))

    logits = classifier(images)

    assert calls(stages) == [1, 1, 1, 1]
    normalized = torch.stack([(images[:, 0] - 0.5) / 0.5, (images[:, 1] - 0.25) / 2, images[:, 2] / 0.1], dim=1)
    expected = normalized
    for stage in stages.values():
        expected = stage(expected)
    torch.testing.assert_close(logits, expected)


def test_without_mean_and_std_images_go_in_as_they_are() -> None:
    images = torch.rand(2, 3, 4, 4)

    (seen,) = Classifier({"pool": nn.Identity()}).features(images, ["pool"])

    assert torch.equal(seen, images)


def test_mean_and_std_travel_with_the_weights() -> None:
    trained = Classifier(counted_stages(), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    loaded = Classifier(counted_stages())
    images = torch.rand(1, 3, 8, 8)

    loaded.load_state_dict(trained.state_dict())

    torch.testing.assert_close(loaded(images), trained(images))


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["stem"], [1, 0, 0, 0]), (["stage1", "stem"], [1, 1, 0, 0]), (["pool"], [1, 1, 1, 0])],
)
def test_nothing_past_the_deepest_feature_runs(names: list[str], expected: list[int]) -> None:
    stages = counted_stages()

    Classifier(stages).features(torch.rand(1, 3, 8, 8), names)

    assert calls(stages) == expected


def test_features_come_in_the_order_asked_for() -> None:
    classifier = Classifier(counted_stages())
    images = torch.rand(2, 3, 8, 8)

    pool, stem, again = classifier.features(images, ["pool", "stem", "pool"])

    torch.testing.assert_close(stem, classifier.stages["stem"](images))
    assert pool.shape == (2, 5, 1, 1)
    assert torch.equal(pool, again)


def test_an_unknown_feature_is_refused_by_name_before_anything_runs() -> None:
    stages = counted_stages()

    with pytest.raises(KeyError, match=r"stage7.*'stem', 'stage1', 'pool', 'head'"):
        Classifier(stages).features(torch.rand(1, 3, 8, 8), ["stem", "stage7"])

    assert calls(stages) == [0, 0, 0, 0]


def test_an_embedding_stage_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(KeyError, match="neck"):
        Classifier(counted_stages(), embedding_stage="neck")


def test_the_embedding_is_flat_and_stops_before_the_head() -> None:
    stages = counted_stages()

    embedding = Classifier(stages).embedding(torch.rand(2, 3, 8, 8))

    assert embedding.shape == (2, 5)
    assert calls(stages) == [1, 1, 1, 0]


def test_another_stage_can_be_the_embedding() -> None:
    embedding = Classifier(counted_stages(), embedding_stage="stage1").embedding(torch.rand(2, 3, 8, 8))

    assert embedding.shape == (2, 5 * 4 * 4)


# Our own architectures


@pytest.mark.parametrize("architecture", QUICK)
def test_the_head_sees_the_embedding(architecture: str) -> None:
    classifier = build_classifier(architecture, num_classes=7, input_size=32).eval()
    images = torch.rand(2, 3, 32, 32)

    with torch.no_grad():
        logits, embedding = classifier(images), classifier.embedding(images)

    assert logits.shape == (2, 7)
    assert logits.std() > 0
    torch.testing.assert_close(classifier.stages["head"](embedding), logits)


@pytest.mark.parametrize("architecture", QUICK)
def test_deeper_stages_leave_a_feature_as_it_was(architecture: str) -> None:
    classifier = build_classifier(architecture, num_classes=3, input_size=32).eval()
    images = torch.rand(1, 3, 32, 32)

    with torch.no_grad():
        together = classifier.features(images, classifier.feature_names)
        alone = [classifier.features(images, [name])[0] for name in classifier.feature_names]

    for feature, feature_alone in zip(together, alone, strict=True):
        assert torch.equal(feature, feature_alone)


@pytest.mark.parametrize("architecture", QUICK)
def test_logits_do_not_depend_on_the_neighbors(architecture: str) -> None:
    classifier = build_classifier(architecture, num_classes=3, input_size=32).eval()
    images = torch.rand(3, 3, 32, 32)

    with torch.no_grad():
        together = classifier(images)
        alone = torch.cat([classifier(image.unsqueeze(0)) for image in images])

    assert together.std(dim=0).min() > 0
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("architecture", QUICK)
def test_gradients_reach_the_image_and_no_frozen_weight(architecture: str) -> None:
    classifier = build_classifier(architecture, num_classes=3, input_size=32).eval().requires_grad_(False)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)

    torch.autograd.backward(classifier(images)[:, 0].sum())

    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("input_size", [32, 64, 224])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_architecture_maps_every_size_to_logits_through_pool_and_head(architecture: str, input_size: int) -> None:
    with torch.device("meta"):  # shapes only: the largest has 267 million parameters
        classifier = build_classifier(architecture, num_classes=12, input_size=input_size).eval()
        images = torch.empty(2, 3, input_size, input_size)

    assert classifier.feature_names[0] in ("stem", "stage1")
    assert classifier.feature_names[-2:] == ("pool", "head")
    assert classifier(images).shape == (2, 12)
    assert classifier.embedding(images).dim() == 2


# Mirrored


def plain_and_mirrored() -> tuple[Classifier, Classifier]:
    """Two classifiers with the same weights."""
    plain, mirrored = (
        build_classifier("wrn-16-2", num_classes=3, input_size=32, mean=(0.5, 0.4, 0.3), mirrored=mirrored).eval()
        for mirrored in (False, True)
    )
    mirrored.load_state_dict(plain.state_dict())
    return plain, mirrored


def test_a_mirrored_classifier_answers_with_the_mean_of_an_image_and_its_mirror_image() -> None:
    plain, mirrored = plain_and_mirrored()
    images = torch.rand(3, 3, 32, 32)

    with torch.no_grad():
        seen, turned = plain(images), plain(images.flip(3))

    assert not torch.allclose(seen, turned)
    torch.testing.assert_close(mirrored(images), (seen + turned) / 2)


def test_features_of_a_mirror_image_are_the_mirrored_features() -> None:
    plain, mirrored = plain_and_mirrored()
    images = torch.rand(2, 3, 32, 32)
    names = ["stage2", "pool"]

    with torch.no_grad():
        (seen, seen_pooled), (turned, turned_pooled) = (
            plain.features(images, names),
            plain.features(images.flip(3), names),
        )
        maps, pooled = mirrored.features(images, names)
        maps_of_mirror, pooled_of_mirror = mirrored.features(images.flip(3), names)

    torch.testing.assert_close(maps, (seen + turned.flip(3)) / 2)
    torch.testing.assert_close(pooled, (seen_pooled + turned_pooled) / 2)
    torch.testing.assert_close(maps_of_mirror, maps.flip(3))
    torch.testing.assert_close(pooled_of_mirror, pooled)
    torch.testing.assert_close(mirrored.stages["head"](pooled), mirrored(images))


def test_a_mirrored_classifier_learns_from_the_images_as_they_come() -> None:
    plain, mirrored = (classifier.train() for classifier in plain_and_mirrored())
    images = torch.rand(4, 3, 32, 32)

    assert isinstance(mirrored, MirroredClassifier)
    torch.testing.assert_close(mirrored(images), plain(images))
    torch.testing.assert_close(mirrored.embedding(images), plain.embedding(images))


def test_logits_of_a_mirrored_classifier_do_not_depend_on_the_neighbors() -> None:
    _, classifier = plain_and_mirrored()
    images = torch.rand(3, 3, 32, 32)

    with torch.no_grad():
        together = classifier(images)
        alone = torch.cat([classifier(image.unsqueeze(0)) for image in images])

    torch.testing.assert_close(alone, together)


def test_mean_and_std_of_a_built_classifier_are_those_given() -> None:
    classifier = build_classifier("speednet", num_classes=2, input_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))

    torch.testing.assert_close(classifier.normalize.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(classifier.normalize.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'resnet19'.*'resnet18'"):
        build_classifier("resnet19", num_classes=10, input_size=32)


# A user's own network


class Foreign(nn.Module):
    """A network with nested layers, one of them used twice, and in-place activations right after the taps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"first": Counted(nn.Conv2d(3, 4, 3)), "second": Counted(nn.Conv2d(4, 4, 3))})
        self.activation = nn.ReLU(inplace=True)
        self.average = Counted(nn.AdaptiveAvgPool2d(1))
        self.classify = Counted(nn.Linear(4, 3))
        self.unused = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features = self.activation(self.body["first"](images))
        features = self.activation(self.body["second"](features))
        logits: Tensor = self.classify(self.average(features).flatten(1))
        return logits

    def calls(self) -> list[int]:
        counted = [module for module in self.modules() if isinstance(module, Counted)]
        return [module.calls for module in counted]


LAYERS = {
    "stem": "body.first",
    "stage1": "body.second",
    "pool": "average",
    "head": "classify",
}
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.3, 0.35)


def adopted_and_named() -> tuple[AdoptedClassifier, Classifier]:
    """A foreign network, adopted, and the same layers as named stages of our own."""
    network = Foreign()
    stages = {
        "stem": network.body["first"],
        "stage1": nn.Sequential(nn.ReLU(), network.body["second"]),
        "pool": nn.Sequential(nn.ReLU(), network.average),
        "head": nn.Sequential(nn.Flatten(), network.classify),
    }
    adopted = AdoptedClassifier(network, LAYERS, mean=MEAN, std=STD)
    return adopted, Classifier(stages, mean=MEAN, std=STD)


def test_an_adopted_network_answers_as_the_same_layers_named_by_hand() -> None:
    adopted, named = adopted_and_named()
    images = torch.rand(2, 3, 8, 8)

    assert adopted.feature_names == named.feature_names
    torch.testing.assert_close(adopted(images), named(images))
    torch.testing.assert_close(adopted.embedding(images), named.embedding(images))
    names = ["head", "stem", "pool", "stage1"]
    features = list(zip(adopted.features(images, names), named.features(images, names), strict=True))
    assert features[1][0].min() < 0  # as before the in-place activation that follows
    for of_adopted, of_named in features:
        torch.testing.assert_close(of_adopted, of_named)


def test_an_adopted_network_has_the_same_gradients_to_the_image() -> None:
    adopted, named = adopted_and_named()
    images = torch.rand(2, 3, 8, 8, requires_grad=True)

    gradients = [
        torch.autograd.grad([feature.square().sum() for feature in features], images)[0]
        for features in (
            adopted.features(images, ["stage1", "stem"]),
            named.features(images, ["stage1", "stem"]),
        )
    ]

    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["stem"], [1, 0, 0, 0]), (["stage1", "stem"], [1, 1, 0, 0]), (["pool"], [1, 1, 1, 0])],
)
def test_an_adopted_network_does_not_run_past_the_deepest_feature(names: list[str], expected: list[int]) -> None:
    network = Foreign()

    AdoptedClassifier(network, LAYERS).features(torch.rand(1, 3, 8, 8), names)

    assert network.calls() == expected


def test_an_adopted_network_is_whole_again_after_its_features_were_taken() -> None:
    adopted, _ = adopted_and_named()
    images = torch.rand(1, 3, 8, 8)
    before = adopted(images)

    adopted.features(images, ["stem", "pool"])
    with pytest.raises(RuntimeError):
        adopted.features(images[:, :2], ["stem", "pool"])  # two channels: the pass fails midway

    assert torch.equal(adopted(images), before)
    assert not any(module._forward_hooks for module in adopted.modules())


def test_a_layer_that_runs_twice_always_gives_its_first_output() -> None:
    layers = {"relu": "activation", **LAYERS}
    adopted = AdoptedClassifier(Foreign(), layers)
    images = torch.rand(1, 3, 8, 8)

    (alone,) = adopted.features(images, ["relu"])
    beside_a_deeper_one, stem, _ = adopted.features(images, ["relu", "stem", "pool"])

    torch.testing.assert_close(alone, stem.relu())
    torch.testing.assert_close(beside_a_deeper_one, stem.relu())


def test_a_feature_that_the_names_lack_is_refused() -> None:
    network = Foreign()

    with pytest.raises(KeyError, match="stage2"):
        AdoptedClassifier(network, LAYERS).features(torch.rand(1, 3, 8, 8), ["stage2"])

    assert network.calls() == [0, 0, 0, 0]


def test_a_layer_that_the_network_lacks_is_refused_at_once() -> None:
    with pytest.raises(AttributeError, match="third"):
        AdoptedClassifier(Foreign(), {**LAYERS, "stage2": "body.third"})


def test_an_embedding_stage_must_be_among_the_names() -> None:
    with pytest.raises(KeyError, match="pool"):
        AdoptedClassifier(Foreign(), {"stem": "body.first"})


def test_a_layer_that_never_runs_is_named() -> None:
    adopted = AdoptedClassifier(Foreign(), {**LAYERS, "spare": "unused"})

    with pytest.raises(KeyError, match="spare"):
        adopted.features(torch.rand(1, 3, 8, 8), ["spare"])

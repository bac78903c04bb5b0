from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models import Bundle, UnknownDefense
from models.classifiers import AdoptedClassifier
from tests.networks import tiny_bundle


def test_the_python_interface_of_the_contract() -> None:
    bundle, images = tiny_bundle(), torch.rand(5, 3, 16, 16)

    assert bundle.classifier(images).shape == (5, 4)
    assert isinstance(bundle.defended("atop", votes=2, seed=1), torch.nn.Module)
    purified = bundle.purify("zeropur:coarse", images, seed=0)
    assert purified.shape == images.shape
    assert not torch.equal(purified, images)
    assert bundle.aid_score(images).shape == (5,)
    assert torch.equal(bundle.purify("none", images), images)
    assert torch.allclose(bundle.probabilities("none", images), bundle.classifier(images).softmax(1))
    with pytest.raises(UnknownDefense):
        bundle.defended("magic")


def test_serving_calls_keep_no_gradient_even_of_weights_that_ask_for_one() -> None:
    bundle, images = tiny_bundle(), torch.rand(2, 3, 16, 16)
    bundle.classifier.requires_grad_(True)

    for defense in ("none", "atop", "aid", "zeropur"):
        assert not bundle.purify(defense, images, seed=0).requires_grad
        assert not bundle.probabilities(defense, images, seed=0).requires_grad
    assert not bundle.aid_score(images).requires_grad
    assert all(parameter.grad is None for parameter in bundle.classifier.parameters())


class Own(nn.Module):
    """The tiny classifier's layers in a network that knows nothing of ours."""

    def __init__(self, stages: nn.ModuleDict) -> None:
        super().__init__()
        self.first, self.second, self.average, self.linear = stages.values()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.average(self.second(self.first(images))))
        return logits


@pytest.mark.parametrize("defense", ["none", "atop", "aid", "zeropur", "atop,aid"])
def test_a_network_of_ones_own_is_defended_like_ours(defense: str) -> None:
    ours = tiny_bundle()
    names = {"stage1": "first", "stage2": "second", "pool": "average", "head": "linear"}
    adopted = AdoptedClassifier(Own(ours.classifier.stages), names)
    theirs = Bundle(ours.manifest, adopted, inpainter=ours.inpainter, discriminator=ours.discriminator)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    purified = [bundle.purify(defense, images, seed=1) for bundle in (ours, theirs)]
    probabilities = [bundle.probabilities(defense, images, seed=1) for bundle in (ours, theirs)]

    torch.testing.assert_close(*purified)
    torch.testing.assert_close(*probabilities)
    torch.testing.assert_close(ours.aid_score(images), theirs.aid_score(images))

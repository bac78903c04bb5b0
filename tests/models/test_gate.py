from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.aid import Aid
from models.bundle import Bundle
from models.defense import DefendedClassifier
from models.gate import GatePurifier
from models.manifest import Manifest, UnknownDefense
from tests.models.test_defense import Jitter, Scale
from tests.networks import SIZE, tiny_aid, tiny_bundle, tiny_classifier, tiny_manifest, with_auto

IMAGES = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def halfway(aid: Aid) -> tuple[float, Tensor]:
    """A threshold that half of the images lie below, and which ones."""
    scores = aid(IMAGES).detach()
    threshold = float(scores.sort().values[2:4].mean())
    return threshold, scores < threshold


@pytest.fixture
def aid() -> Aid:
    return tiny_aid(tiny_classifier())


def test_suspects_take_the_strong_chain_and_all_others_the_cheap_one(aid: Aid) -> None:
    threshold, suspects = halfway(aid)
    gate = GatePurifier(aid, threshold, cheap=[Scale(0.9, 0.0)], strong=[Scale(0.5, 0.0), Scale(1.0, 0.1)])

    purified = gate(IMAGES, range(6))

    assert torch.equal(gate.suspects(IMAGES), suspects)
    assert suspects.sum() == 3
    torch.testing.assert_close(purified[suspects], IMAGES[suspects] * 0.5 + 0.1)
    torch.testing.assert_close(purified[~suspects], IMAGES[~suspects] * 0.9)


def test_without_a_cheap_chain_natural_images_stay_as_they_are(aid: Aid) -> None:
    threshold, suspects = halfway(aid)
    purified = GatePurifier(aid, threshold, cheap=[], strong=[Scale(0.5, 0.0)])(IMAGES, range(6))
    assert torch.equal(purified[~suspects], IMAGES[~suspects])
    assert not torch.equal(purified[suspects], IMAGES[suspects])


@pytest.mark.parametrize(("threshold", "factor"), [(0.0, 0.9), (1.0, 0.5)])
def test_all_on_one_side_is_that_chain_alone(threshold: float, factor: float, aid: Aid) -> None:
    gate = GatePurifier(aid, threshold, cheap=[Scale(0.9, 0.0)], strong=[Scale(0.5, 0.0)])
    torch.testing.assert_close(gate(IMAGES, range(6)), factor * IMAGES)


def test_an_image_is_purified_alike_alone_and_among_others(aid: Aid) -> None:
    threshold, _ = halfway(aid)
    gate = GatePurifier(aid, threshold, cheap=[Jitter()], strong=[Jitter(), Jitter()])
    assert gate.is_random
    whole = gate(IMAGES, range(6))
    for index in range(6):
        torch.testing.assert_close(gate(IMAGES[index : index + 1], [index])[0], whole[index])
    assert not torch.equal(gate(IMAGES, range(6, 12)), whole)


def test_the_strong_chain_sees_suspects_only(aid: Aid) -> None:
    threshold, suspects = halfway(aid)
    strong = Jitter()
    GatePurifier(aid, threshold, cheap=[], strong=[strong])(IMAGES, range(6))
    assert [len(seeds) for seeds in strong.seeds] == [int(suspects.sum())]


def test_gradients_go_through_the_chain_that_ran(aid: Aid) -> None:
    threshold, suspects = halfway(aid)
    images = IMAGES.clone().requires_grad_()
    gate = GatePurifier(aid, threshold, cheap=[], strong=[Scale(0.5, 0.0)])
    gate(images, range(6)).sum().backward()
    assert images.grad is not None
    expected = torch.where(suspects, 0.5, 1.0).view(-1, 1, 1, 1).expand_as(images)
    torch.testing.assert_close(images.grad, expected)


# As a defense of a bundle


def gated(strong: str = "zeropur", cheap: str = "none") -> tuple[Bundle, Tensor]:
    bundle = tiny_bundle()
    assert bundle.aid is not None
    threshold, suspects = halfway(bundle.aid)
    return with_auto(bundle, threshold, strong=strong, cheap=cheap), suspects


def test_a_bundle_runs_the_chains_that_its_preset_names_and_says_which() -> None:
    bundle, suspects = gated("zeropur:coarse", "none")

    purified = bundle.purify("auto", IMAGES, seed=3)

    torch.testing.assert_close(purified[suspects], bundle.purify("zeropur:coarse", IMAGES[suspects]))
    assert torch.equal(purified[~suspects], IMAGES[~suspects])
    expected = ["zeropur:coarse" if suspect else "none" for suspect in suspects.tolist()]
    assert bundle.ran("auto", IMAGES) == bundle.ran("auto:gate", IMAGES) == expected
    assert bundle.ran("atop", IMAGES) == ["atop"] * 6
    assert torch.equal(bundle.purify("auto", IMAGES, seed=3, ran=bundle.ran("auto", IMAGES)), purified)
    everything = bundle.purify("auto", IMAGES, seed=3, ran=["zeropur:coarse"] * 6)
    torch.testing.assert_close(everything, bundle.purify("zeropur:coarse", IMAGES))
    assert isinstance(bundle.defended("auto"), DefendedClassifier)


def test_what_is_known_already_is_not_scored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = gated()
    ran, expected = bundle.ran("auto", IMAGES), bundle.purify("auto", IMAGES, seed=3)

    def never(self: Aid, images: Tensor) -> Tensor:
        raise AssertionError("it was scored again")

    monkeypatch.setattr(Aid, "forward", never)
    assert torch.equal(bundle.purify("auto", IMAGES, seed=3, ran=ran), expected)


@pytest.mark.parametrize("votes", [1, 3])
@pytest.mark.parametrize("choice", ["none", "as it says"])
def test_every_vote_takes_the_chains_that_it_is_told(votes: int, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = gated("zeropur:coarse", "atop")
    ran = bundle.ran("auto", IMAGES) if choice != "none" else ["atop"] * 6
    same = bundle if choice != "none" else with_auto(tiny_bundle(), 0.0, strong="zeropur:coarse", cheap="atop")
    expected = same.probabilities("auto", IMAGES, votes=votes, seed=3)

    def never(self: Aid, images: Tensor) -> Tensor:
        raise AssertionError("it was scored again")

    monkeypatch.setattr(Aid, "forward", never)
    torch.testing.assert_close(bundle.probabilities("auto", IMAGES, votes=votes, seed=3, ran=ran), expected)


def test_a_manifest_says_what_decides() -> None:
    manifest = gated()[0].manifest
    assert manifest.defenses.auto is not None
    assert manifest.gate("auto") is manifest.gate("auto:gate") is manifest.defenses.auto.presets["gate"]
    assert [manifest.gate(chain) for chain in ("none", "atop", "zeropur:coarse", "atop,aid")] == [None] * 4
    assert tiny_manifest().gate("atop") is None


@pytest.mark.parametrize(("strong", "cheap", "random"), [("zeropur", "none", False), ("zeropur", "atop", True)])
def test_auto_is_random_if_one_of_its_chains_is(strong: str, cheap: str, random: bool) -> None:
    bundle, _ = gated(strong, cheap)
    assert bundle.manifest.is_random("auto") is bundle.defended("auto").is_random is random


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        ({"strong": "atop:rt9"}, "defense atop has the presets"),
        ({"strong": "auto"}, "stands behind itself"),
        ({"strong": "atop", "cheap": "magic"}, "offers the defenses"),
        ({"strong": "atop", "threshold": 1.5}, "less than or equal to 1"),
    ],
)
def test_a_gate_that_cannot_work_is_refused(gate: dict[str, object], reason: str) -> None:
    content = tiny_manifest().model_dump()
    preset = {"threshold": 0.5, "false_positive_rate": 0.1, **gate}
    content["defenses"]["auto"] = {"default_preset": "gate", "presets": {"gate": preset}}
    with pytest.raises(ValidationError, match=reason):
        Manifest.model_validate(content)


def test_a_gate_without_a_detector_is_refused() -> None:
    content = tiny_manifest().model_dump()
    preset = {"strong": "atop", "threshold": 0.5, "false_positive_rate": 0.1}
    content["defenses"] |= {"aid": None, "auto": {"default_preset": "gate", "presets": {"gate": preset}}}
    with pytest.raises(ValidationError, match="auto needs aid"):
        Manifest.model_validate(content)


@pytest.mark.parametrize("chain", ["atop,auto", "auto,atop"])
def test_auto_stands_alone(chain: str) -> None:
    bundle, _ = gated()
    with pytest.raises(UnknownDefense, match="auto stands alone"):
        bundle.manifest.resolve(chain)

"""A batch of images in, an answer for each out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from service.engine import DeviceUnavailable, Engine, choose_device
from service.errors import NotFinite
from service.images import to_floats
from service.tokens import TokenBucket
from service.work import Classified, Detected, EngineFault, Floats, Key, Operation, Pixels, Purified
from tests.networks import SIZE, tiny_bundle, with_auto
from tests.service.clock import Clock
from tests.service.fakes import NAN_VALUE, FakeBundle, dark, green, marked
from tests.service.manifests import CLASSES, SIDE, fake_manifest

NAME = "colors@1"
CLASSIFY = Key(Operation.CLASSIFY, NAME)


def engine(bundle: FakeBundle | None = None) -> Engine:
    return Engine({NAME: bundle or FakeBundle()}, torch.device("cpu"))


def run(
    key: Key, pixels: Sequence[Pixels | Floats], seeds: Sequence[int], bundle: FakeBundle | None = None
) -> list[object]:
    """The outcomes of one batch."""
    return list(engine(bundle).run(key, pixels, seeds).outcomes)


def gated() -> FakeBundle:
    return FakeBundle(fake_manifest(auto=True))


def images(count: int) -> list[Pixels]:
    rng = np.random.default_rng(0)
    return list(rng.integers(10, 256, (count, SIDE, SIDE, 3), dtype=np.uint8))


def test_classify_gives_each_image_its_own_probabilities() -> None:
    pixels = images(3)
    answers = run(CLASSIFY, pixels, [0, 0, 0])
    for image, answer in zip(pixels, answers, strict=True):
        assert isinstance(answer, Classified)
        expected = torch.softmax(torch.from_numpy(10 * to_floats(image).mean((0, 1))), 0)
        assert np.allclose(answer.probabilities, expected, atol=1e-5)
        assert (answer.undefended, answer.aid_score) == (None, None)


def test_explain_adds_the_undefended_answer_and_the_score() -> None:
    key = Key(Operation.CLASSIFY, NAME, "atop", explain=True)
    (answer,) = run(key, [green()], [0])
    assert isinstance(answer, Classified)
    (bare,) = run(CLASSIFY, [green()], [0])
    assert isinstance(bare, Classified)
    assert answer.undefended is not None
    assert np.allclose(answer.undefended, bare.probabilities)
    assert not np.allclose(answer.probabilities, bare.probabilities)
    assert answer.aid_score == pytest.approx(to_floats(green()).mean(), abs=1e-5)


def test_auto_says_which_chain_ran_for_each_image_and_others_do_not() -> None:
    answers = run(Key(Operation.CLASSIFY, NAME, "auto"), [green(), dark()], [0, 0], gated())
    answers += run(Key(Operation.CLASSIFY, NAME, "atop"), [green()], [0], FakeBundle())
    assert [answer.ran for answer in answers if isinstance(answer, Classified)] == ["none", "zeropur", None]


def capped(clock: Clock, *, per_s: float = 0.5, burst: int = 2, bundle: FakeBundle | None = None) -> Engine:
    return Engine({NAME: bundle or gated()}, torch.device("cpu"), TokenBucket(per_s, burst, clock))


def chains(engine: Engine, pixels: Sequence[Pixels], **key: Any) -> list[tuple[str | None, bool]]:
    """What `auto` ran for each of `pixels`, and whether it says that it was degraded."""
    asked = Key(Operation.CLASSIFY, NAME, "auto", **key)
    outcomes = engine.run(asked, pixels, [0] * len(pixels)).outcomes
    return [(answer.ran, answer.degraded) for answer in outcomes if isinstance(answer, Classified)]


STRONG, DEGRADED, NATURAL = ("zeropur", False), ("none", True), ("none", False)


def test_row_47_a_flood_of_unnatural_images_gets_the_cheap_chain_until_tokens_are_back() -> None:
    clock = Clock()
    engine = capped(clock)
    assert chains(engine, [dark()] * 4) == [STRONG, STRONG, DEGRADED, DEGRADED]
    assert chains(engine, [dark()]) == [DEGRADED]
    clock.now = 2.0
    assert chains(engine, [dark()] * 2) == [STRONG, DEGRADED]
    clock.now = 1000.0
    assert chains(engine, [dark()] * 3) == [STRONG, STRONG, DEGRADED]


def test_row_47_natural_images_take_no_token_and_are_never_degraded() -> None:
    engine = capped(Clock())
    assert chains(engine, [green()] * 9) == [NATURAL] * 9
    assert chains(engine, [green(), dark(), green(), dark(), dark(), green()]) == [
        NATURAL, STRONG, NATURAL, STRONG, DEGRADED, NATURAL,
    ]  # fmt: skip
    assert chains(engine, [green()]) == [NATURAL]


def test_without_a_cap_nothing_is_degraded() -> None:
    assert chains(Engine({NAME: gated()}, torch.device("cpu")), [dark()] * 40) == [STRONG] * 40


@pytest.mark.parametrize("operation", [Operation.CLASSIFY, Operation.PURIFY])
def test_row_47_what_is_degraded_went_through_the_cheap_chain(operation: Operation) -> None:
    key = Key(operation, NAME, "auto", purified=operation is Operation.CLASSIFY)
    outcomes = capped(Clock(), burst=1).run(key, [dark(), dark(), green()], [0, 0, 0]).outcomes
    images = [one.image if isinstance(one, Purified) else getattr(one, "purified", None) for one in outcomes]
    for image, expected in zip(images, (dark()[::-1], dark(), green()), strict=True):
        assert image is not None
        assert np.array_equal(image, to_floats(expected))
    assert [getattr(one, "degraded", None) for one in outcomes] == [False, True, False]


def test_row_47_each_vote_is_a_run_of_the_strong_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, bundle = Clock(), gated()
    seen = list[object]()
    probabilities = bundle.probabilities

    def watched(defense: str, images: Tensor, **named: Any) -> Tensor:
        seen.append((named["votes"], named["ran"]))
        return probabilities(defense, images, **named)

    monkeypatch.setattr(bundle, "probabilities", watched)
    engine = capped(clock, burst=4, bundle=bundle)
    assert chains(engine, [dark()] * 3, votes=3) == [STRONG, STRONG, DEGRADED]
    assert seen == [(3, ["zeropur", "zeropur", "none"])]
    clock.now = 5.0  # 2.5 tokens: two were owed
    assert chains(engine, [dark()], votes=3) == [DEGRADED]
    clock.now = 6.0
    assert chains(engine, [dark()], votes=3) == [STRONG]


def test_row_47_an_explained_answer_that_is_degraded_keeps_its_score() -> None:
    key = Key(Operation.CLASSIFY, NAME, "auto", explain=True)
    outcomes = capped(Clock(), burst=1).run(key, [dark(), dark()], [0, 0]).outcomes
    first, second = (one for one in outcomes if isinstance(one, Classified))
    assert (first.degraded, second.degraded) == (False, True)
    assert second.undefended is not None
    assert first.aid_score == second.aid_score == pytest.approx(to_floats(dark()).mean(), abs=1e-5)


def test_other_defenses_and_detection_take_no_token() -> None:
    engine = capped(Clock(), burst=1)
    for key in (Key(Operation.CLASSIFY, NAME, "zeropur"), Key(Operation.DETECT, NAME)):
        outcomes = engine.run(key, [dark()] * 3, [0] * 3).outcomes
        assert not any(getattr(outcome, "degraded", False) for outcome in outcomes)
    assert chains(engine, [dark()]) == [STRONG]


def test_floats_are_judged_as_they_are_and_pixels_as_their_255th() -> None:
    pixels = images(2)
    key = Key(Operation.CLASSIFY, NAME, purified=True)
    from_pixels = run(key, pixels, [0, 0])
    from_floats = run(replace(key, floats=True), [to_floats(image) for image in pixels], [0, 0])
    fine = np.nextafter(to_floats(pixels[0]), np.float32(0))
    (finer,) = run(replace(key, floats=True), [fine], [0])
    for image, one, other in zip(pixels, from_pixels, from_floats, strict=True):
        assert isinstance(one, Classified)
        assert isinstance(other, Classified)
        assert np.array_equal(one.probabilities, other.probabilities)
        assert other.purified is not None
        assert np.array_equal(other.purified, to_floats(image))
    assert isinstance(finer, Classified)
    assert finer.purified is not None
    assert np.array_equal(finer.purified, fine)


@pytest.mark.parametrize("defense", ["none", "atop"])
def test_a_classification_hands_back_the_image_that_it_judged(defense: str) -> None:
    (answer,) = run(Key(Operation.CLASSIFY, NAME, defense, purified=True), [green()], [5])
    (purified,) = run(Key(Operation.PURIFY, NAME, defense), [green()], [5]) if defense != "none" else (None,)
    assert isinstance(answer, Classified)
    assert answer.purified is not None
    expected = purified.image if isinstance(purified, Purified) else to_floats(green())
    assert np.array_equal(answer.purified, expected)
    (bare,) = run(Key(Operation.CLASSIFY, NAME), [expected], [0])
    assert isinstance(bare, Classified)
    assert np.allclose(answer.probabilities, bare.probabilities)
    (usual,) = run(Key(Operation.CLASSIFY, NAME, defense), [green()], [5])
    assert isinstance(usual, Classified)
    assert usual.purified is None


def test_explain_without_a_detector_has_no_score() -> None:
    bundle = FakeBundle(fake_manifest(aid=False))
    (answer,) = run(Key(Operation.CLASSIFY, NAME, explain=True), [green()], [0], bundle)
    assert isinstance(answer, Classified)
    assert answer.aid_score is None
    assert answer.undefended is not None


def test_purify_gives_images_and_their_distance_to_the_input() -> None:
    pixels = images(2)
    answers = run(Key(Operation.PURIFY, NAME, "zeropur"), pixels, [0, 0])
    for image, answer in zip(pixels, answers, strict=True):
        assert isinstance(answer, Purified)
        expected = to_floats(image[::-1])
        assert np.allclose(answer.image, expected, atol=1e-6)
        assert answer.linf == pytest.approx(abs(expected - to_floats(image)).max(), abs=1e-6)


def test_detect_gives_the_score() -> None:
    (answer,) = run(Key(Operation.DETECT, NAME), [green()], [0])
    assert isinstance(answer, Detected)
    assert answer.aid_score == pytest.approx(to_floats(green()).mean(), abs=1e-5)


def test_the_same_image_and_seed_give_the_same_answer_alone_and_among_others() -> None:
    key = Key(Operation.PURIFY, NAME, "atop")
    pixels = images(5)
    (alone,) = run(key, [pixels[3]], [2**64 - 1])
    among = run(key, pixels, [1, 2, 3, 2**64 - 1, 5])[3]
    other_seed = run(key, [pixels[3]], [7])[0]
    assert isinstance(alone, Purified)
    assert isinstance(among, Purified)
    assert isinstance(other_seed, Purified)
    assert np.allclose(alone.image, among.image)
    assert not np.allclose(alone.image, other_seed.image)


@pytest.mark.parametrize("operation", [Operation.CLASSIFY, Operation.PURIFY])
def test_row_46_an_answer_that_is_not_finite_is_an_error_of_that_image_only(operation: Operation) -> None:
    answers = run(Key(operation, NAME), [green(), marked(NAN_VALUE), green()], [0, 0, 0])
    assert [isinstance(answer, NotFinite) for answer in answers] == [False, True, False]


def test_votes_and_seeds_reach_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[object]()

    def probabilities(
        defense: str,
        images: Tensor,
        votes: int = 1,
        seed: int | Sequence[int] | None = None,
        ran: Sequence[str] | None = None,
    ) -> Tensor:
        seen.append((defense, tuple(images.shape), images.dtype, votes, seed))
        return torch.full((len(images), len(CLASSES)), 1 / 3)

    bundle = FakeBundle()
    monkeypatch.setattr(bundle, "probabilities", probabilities)
    engine(bundle).run(Key(Operation.CLASSIFY, NAME, "atop:rt1", votes=7), images(2), [5, 6])
    assert seen == [("atop:rt1", (2, 3, SIDE, SIDE), torch.float32, 7, [5, 6])]


def test_gradients_are_left_to_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = list[tuple[bool, bool]]()

    def purify(
        defense: str, images: Tensor, seed: int | Sequence[int] | None = None, ran: Sequence[str] | None = None
    ) -> Tensor:
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return images.clone().requires_grad_()

    bundle = FakeBundle()
    monkeypatch.setattr(bundle, "purify", purify)
    assert isinstance(run(Key(Operation.PURIFY, NAME), [green()], [0], bundle)[0], Purified)
    assert modes == [(True, False)]


def test_running_out_of_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("none left")

    bundle = FakeBundle()
    monkeypatch.setattr(bundle, "probabilities", exhausted)
    with pytest.raises(EngineFault) as caught:
        engine(bundle).run(CLASSIFY, [green()], [0])
    assert caught.value.kind == "oom"


def test_warming_runs_every_defense_at_every_size() -> None:
    bundle = FakeBundle()
    engine(bundle).warm([1, 4])
    calls = 1 + 3 * 2 + 1  # none; atop, aid and zeropur, which are purified and classified apart; and detection
    other_presets = 1 * 2  # atop:rt1
    assert sorted(bundle.batches) == [1] * (calls + other_presets) + [4] * calls


def test_after_warming_no_preset_is_recorded_for_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = with_auto(tiny_bundle(), 0.5)
    bundle.record()
    warm = Engine({NAME: bundle}, torch.device("cpu"))
    warm.warm([1])
    recorded = list[object]()
    monkeypatch.setattr("models.recorded.recording", lambda *given: recorded.append(given))
    offered = bundle.manifest.defenses.offered()
    presets = [f"{defense}:{preset}" for defense, spec in offered.items() for preset in spec.presets]
    assert len(presets) > len(offered)
    image = np.random.default_rng(0).integers(0, 256, (*bundle.input_size, 3), np.uint8)
    for preset in presets:
        warm.run(Key(Operation.CLASSIFY, NAME, bundle.manifest.resolve(preset)), [image], [7])
    assert recorded == []


def test_of_two_bundles_with_one_name_the_digest_tells_which_runs() -> None:
    old, new = FakeBundle(), FakeBundle()
    old.digest, new.digest = "a" * 64, "b" * 64
    held = engine(old)
    held.hold({NAME: new}, {NAME: old})
    for digest in (old.digest, new.digest, ""):
        held.run(replace(CLASSIFY, digest=digest), [green()], [0])
    assert (old.batches, new.batches) == ([1], [1, 1])
    held.hold({NAME: new})
    with pytest.raises(LookupError):
        held.run(replace(CLASSIFY, digest=old.digest), [green()], [0])


def test_devices_are_chosen_or_refused() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(DeviceUnavailable, match="CLARIFIER_DEVICE"):
        choose_device("cuda:99")


def test_explaining_no_defense_runs_the_classifier_once() -> None:
    bundle = FakeBundle(fake_manifest(aid=False))
    run(Key(Operation.CLASSIFY, NAME, explain=True), [green()], [0], bundle)
    assert bundle.batches == [1]


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        (CLASSIFY, ["classify"]),
        (Key(Operation.CLASSIFY, NAME, "atop"), ["purify", "classify"]),
        (Key(Operation.CLASSIFY, NAME, "atop", votes=2), ["classify"]),
        (Key(Operation.PURIFY, NAME, "atop"), ["purify"]),
        (Key(Operation.DETECT, NAME), ["classify"]),
    ],
)
def test_stages_are_timed_apart(key: Key, stages: list[str]) -> None:
    bundle = FakeBundle()
    bundle.delay_s = 0.02
    stage_ms = engine(bundle).run(key, [green()], [0]).stage_ms
    assert list(stage_ms) == stages
    assert all(milliseconds >= 20 for milliseconds in stage_ms.values())


def test_purifying_apart_gives_the_bundles_own_answer() -> None:
    bundle = tiny_bundle()
    pixels = list(np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8))
    key = Key(Operation.CLASSIFY, "tiny@1", "atop,aid")
    outcomes = Engine({"tiny@1": bundle}, torch.device("cpu")).run(key, pixels, [4, 5, 6]).outcomes
    images = torch.from_numpy(to_floats(np.stack(pixels))).permute(0, 3, 1, 2)
    expected = bundle.probabilities("atop,aid", images, seed=[4, 5, 6])
    for outcome, row in zip(outcomes, expected, strict=True):
        assert isinstance(outcome, Classified)
        assert np.allclose(outcome.probabilities, row, atol=1e-5)

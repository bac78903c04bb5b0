from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests.fakes import linear_classifier
from tests.networks import SIZE, sensitive, tiny_classifier
from training import grey_box
from training.attacks.pgd import cross_entropy
from training.attacks.threats import assert_in_budget
from training.budgets import GreyBoxName

IMAGES = 0.2 + 0.6 * torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name", ["fgsm", "pgd3", "pgd20", "mim", "deepfool", "cw", "cw20", "di2", "pgd_l2", "pgd5_l2", "autoattack"]
)
def test_every_attack_repeats_keeps_to_its_threat_and_raises_the_loss(name: str) -> None:
    classifier = sensitive(tiny_classifier(), IMAGES)
    labels = classifier(IMAGES).argmax(1)
    attack = grey_box.attack(name, classifier, eps=0.1, seed=4)

    moved = attack.run(IMAGES, labels, range(6))

    assert torch.equal(moved, attack.run(IMAGES, labels, range(6)))
    assert torch.equal(moved, moved.clamp(0, 1))
    if attack.threat is not None:
        assert_in_budget(moved, IMAGES, attack.threat, name)
    loss = [cross_entropy(classifier(images), labels).mean().item() for images in (IMAGES, moved)]
    assert loss[1] > loss[0]
    if name in ("autoattack", "cw"):
        changed = (moved != IMAGES).flatten(1).any(1)
        assert changed.sum() >= 5
        assert (classifier(moved).argmax(1) != labels)[changed].all()
    assert attack.passes >= 1


@pytest.mark.parametrize("name", ["cw", "cw20"])
def test_an_image_that_carlini_and_wagners_attack_fails_on_stays(name: str) -> None:
    sure = linear_classifier(torch.rand(2, IMAGES[0].numel()), torch.tensor([1e4, 0.0])).requires_grad_(False)
    labels = torch.zeros(6, dtype=torch.long)
    assert torch.equal(grey_box.attack(name, sure, eps=0.1, seed=4).run(IMAGES, labels, range(6)), IMAGES)


def test_the_name_of_pgd_has_its_steps() -> None:
    classifier = tiny_classifier()
    for norm in ("", "_l2"):
        attacks = [grey_box.attack(f"pgd{n}{norm}", classifier, eps=0.1, seed=0) for n in (1, 20, 1000)]
        assert [attack.settings["steps"] for attack in attacks] == [1, 20, 1000]
        assert [attack.passes for attack in attacks] == [1, 20, 1000]
    images, labels = IMAGES, classifier(IMAGES).argmax(1)
    runs = {n: grey_box.attack(n, classifier, eps=0.1, seed=0) for n in ("pgd_l2", "pgd20_l2", "pgd2_l2")}
    assert runs["pgd_l2"].settings == runs["pgd20_l2"].settings
    assert torch.equal(*(runs[name].run(images, labels, range(6)) for name in ("pgd_l2", "pgd20_l2")))
    assert not torch.equal(*(runs[name].run(images, labels, range(6)) for name in ("pgd2_l2", "pgd20_l2")))


@pytest.mark.parametrize("name", ["pgd", "pgd0", "pgd_l20", "pgd0_l2", "pgd-5", "bim", "FGSM", "pgd20 "])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(GreyBoxName).validate_python(name)

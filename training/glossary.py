"""A line on every attack, for readers of a report who do not know them."""

from __future__ import annotations

import re

KNOWS_THE_CLASSIFIER = {
    r"fgsm": "one step up the loss of the classifier",
    r"pgd\d+": "as many small steps up the loss of the classifier as its name says, within the ball",
    r"pgd\d*_l2": "small steps up the loss of the classifier, with a bound on the Euclidean distance instead",
    r"mim": "small steps up the loss of the classifier, with momentum",
    r"di2": "small steps up the loss, each from a resized copy, so that it works on other networks too",
    r"deepfool": "to the nearest boundary of the classifier",
    r"cw": "Carlini and Wagner: the smallest change that the classifier falls for, without a bound",
    r"cw20": "Carlini and Wagner in 20 steps with a small constant, within a Euclidean distance of 3",
    r"autoattack": "AutoAttack: four attacks on the classifier, one after the other",
}
KNOWS_THE_DEFENSE = {
    r"bpda": "the purifier is run, but counts as unchanged in the gradient",
    r"full": "the exact gradient through transform, purifier and classifier, a mean over draws",
    r"apgd_ce": "Auto-PGD through everything, up the cross-entropy: its steps shrink as it needs",
    r"apgd_dlr": "Auto-PGD through everything, up the ratio of differences of logits",
    r"fixed_look": "the exact gradient of one answer, its randomness always the same",
    r"aware_aid_.*": "fools the classifier while AID sees a natural image",
    r"aware_zeropur_.*": "fools the classifier where blurring changes nothing that ZeroPur could follow",
    r"past_gate": "passes the gate of auto, and fools what stands behind it for natural images",
    r"iterates": "the gradient at every step of the purifier, averaged",
    r"smooth_steps_.*": "the gradient through every step of the purifier, with smooth steps in the place of signs",
    r"square": "tries squares of color at random, and sees answers only",
    r"transfer_.*": "images that fool another classifier",
}
WAS_NOT_EXPECTED = {
    r"l2": "the exact gradient, with a bound on the Euclidean distance",
    r"eps_times_.*": "the exact gradient, with another bound",
    r"known_seed": "the exact gradient, of an attacker who knows the seed of the randomness",
    r"stadv": "moves pixels instead of changing them",
}


def what_it_does(attack: str, level: str) -> str:
    """A line on an attack of level L1 to L6; "" for one that a recipe gave a name of its own."""
    known = {"L1": KNOWS_THE_CLASSIFIER, "L6": WAS_NOT_EXPECTED}.get(level, KNOWS_THE_DEFENSE)
    return next((line for name, line in known.items() if re.fullmatch(name, attack)), "")

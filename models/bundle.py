"""A classifier and its defenses, as a service, a notebook or an evaluation uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.aid import Aid, AidDiscriminator, AidPurifier
from models.atop import AtopPurifier
from models.classifiers import Classifier
from models.defense import DefendedClassifier, Purifier, Seed
from models.gate import DecidedGate, GatePurifier
from models.manifest import AidSpec, AtopSpec, AutoSpec, Manifest, ZeroPurSpec
from models.packed import packed_twin
from models.recorded import record_forward
from models.zeropur import ZeroPurPurifier


class BundleError(ValueError):
    """A bundle that is refused; the message is one sentence that names the file and the reason."""


class Bundle:
    """A loaded bundle: a frozen classifier and its defenses, on one device, in eval mode.

    `classifier`, `inpainter` and `discriminator` are the networks as they are; the defenses run twins of them that
    share their weights and keep them packed (see `models.packed`).
    """

    def __init__(
        self,
        manifest: Manifest,
        classifier: Classifier,
        *,
        inpainter: nn.Module | None = None,
        discriminator: AidDiscriminator | None = None,
        report: Mapping[str, object] | None = None,
        digest: str = "",
    ) -> None:
        """Put the parts of `manifest` together. `digest` is the sha256 of bundle.json, empty if never saved."""
        self.manifest, self.classifier, self.digest = manifest, classifier, digest
        self.report = dict(report or {})
        self.inpainter, self.discriminator = inpainter, discriminator
        for part in (classifier, inpainter, discriminator):
            if part is not None:
                part.eval().requires_grad_(False)
        self._classifier_twin = packed_twin(classifier)
        self._inpainter_twin = None if inpainter is None else packed_twin(inpainter)
        self._recorded_purifiers: dict[tuple[str, str], Purifier] | None = None
        aid = manifest.defenses.aid
        self.aid: Aid | None = None
        if aid is not None and discriminator is not None:
            self.aid = Aid(self._classifier_twin, discriminator, aid.taps).eval()

    def record(self) -> None:
        """Have what the networks do to single images on a CPU recorded: less time, and the same bits.

        For a bundle that serves: its networks, also those that `defended` hands out, must not be changed any more, nor
        may hooks be put on them. See `models.recorded`.
        """
        if self._recorded_purifiers is None:
            self._recorded_purifiers = {}
            for network in (self._classifier_twin, self._inpainter_twin, self.aid):
                if network is not None:
                    record_forward(network)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by index."""
        return self.manifest.classes

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.manifest.input_size

    @property
    def default_defense(self) -> str:
        """The chain that answers a request which names none."""
        return self.manifest.default_defense

    def defended(self, defense: str, votes: int = 1, seed: Seed = None) -> DefendedClassifier:
        """The classifier behind a chain such as `atop`, `zeropur:coarse` or `atop,aid`; see `DefendedClassifier`.

        Raises UnknownDefense for a chain that the bundle does not offer.
        """
        return self._behind(self._chain(defense), votes, seed)

    def _behind(self, chain: Sequence[Purifier], votes: int, seed: Seed) -> DefendedClassifier:
        defended = DefendedClassifier(self._classifier_twin, chain, votes=votes, seed=seed)
        if self._recorded_purifiers is None:
            return defended.eval()
        for new in (defended, defended.chain, *defended.chain):  # all below stays in eval mode: to walk it takes long
            new.training = False
        return defended

    def _chain(self, defense: str) -> list[Purifier]:
        return [self._purifier(name, preset) for name, preset in self.manifest.chain(defense)]

    def _purifier(self, name: str, preset: str) -> Purifier:
        """A new one, or the one that keeps the recordings."""
        if self._recorded_purifiers is None:
            return self._new_purifier(name, preset)
        if (name, preset) not in self._recorded_purifiers:
            purifier = self._new_purifier(name, preset)
            if isinstance(purifier, AidPurifier | ZeroPurPurifier):
                purifier.record()
            assert isinstance(purifier, nn.Module)
            purifier.eval()
            self._recorded_purifiers[name, preset] = purifier
        return self._recorded_purifiers[name, preset]

    def _new_purifier(self, name: str, preset: str) -> Purifier:
        spec = self.manifest.defenses.offered()[name]
        match spec:
            case AtopSpec() if self._inpainter_twin is not None:
                return AtopPurifier(self._inpainter_twin, spec.presets[preset])
            case AidSpec() if self.aid is not None:
                return AidPurifier(self.aid, spec.presets[preset])
            case ZeroPurSpec():
                return ZeroPurPurifier(self._classifier_twin, spec.presets[preset])
            case AutoSpec() if self.aid is not None:
                gate = spec.presets[preset]
                cheap, strong = self._chain(gate.cheap), self._chain(gate.strong)
                return GatePurifier(self.aid, gate.threshold, cheap=cheap, strong=strong)
        raise BundleError(f"bundle {self.manifest.name} offers {name} but was put together without its network")

    @torch.no_grad()
    def purify(self, defense: str, images: Tensor, seed: Seed = None, ran: Sequence[str] | None = None) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] after the chain; same shape and range. No gradient is kept.

        `ran` tells `auto` which of its two chains to run for each image, so that it does not score them: what the
        method of that name said, or another choice.
        """
        defended = self._decided(defense, images, 1, seed, ran)
        return defended.purify(images, defended.seeds_for(images))

    @torch.no_grad()
    def probabilities(
        self, defense: str, images: Tensor, votes: int = 1, seed: Seed = None, ran: Sequence[str] | None = None
    ) -> Tensor:
        """Probabilities (N, K) behind the chain, averaged over `votes` draws. No gradient is kept.

        `ran` as in `purify`.
        """
        logits: Tensor = self._decided(defense, images, votes, seed, ran)(images)
        return logits.softmax(1)

    def _decided(
        self, defense: str, images: Tensor, votes: int, seed: Seed, ran: Sequence[str] | None
    ) -> DefendedClassifier:
        """As `defended`; where `ran` says so, `auto` runs these chains for `images`."""
        preset = None if ran is None else self.manifest.gate(defense)
        if ran is None or preset is None:
            return self.defended(defense, votes=votes, seed=seed)
        (gate,) = self._chain(defense)
        assert isinstance(gate, GatePurifier)
        suspects = torch.tensor([chain == preset.strong for chain in ran], device=images.device)
        return self._behind([DecidedGate(gate, suspects)], votes, seed)

    @torch.no_grad()
    def ran(self, defense: str, images: Tensor) -> list[str]:
        """For every image (N, 3, H, W), the chain that `auto` chooses for it; any other defense is itself."""
        preset = self.manifest.gate(defense)
        if preset is None:
            return [defense] * len(images)
        (gate,) = self._chain(defense)
        assert isinstance(gate, GatePurifier)
        return [preset.strong if suspect else preset.cheap for suspect in gate.suspects(images).tolist()]

    @torch.no_grad()
    def aid_score(self, images: Tensor) -> Tensor:
        """(N,) in [0, 1]: 1 natural, 0 adversarial. Raises BundleError if the bundle has no AID."""
        if self.aid is None:
            raise BundleError(f"bundle {self.manifest.name} has no AID discriminator")
        score: Tensor = self.aid(images)
        return score

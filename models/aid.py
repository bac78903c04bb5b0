"""AID-Purifier (Hwang et al., 2021): a discriminator on two layers of the classifier, used as a purifier.

D(x) is the probability that x is *natural* (1 natural, 0 adversarial), the polarity of the released code and the mirror
image of the paper's text. Purification ascends D.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.classifiers import Classifier
from models.gradients import ball, exact_identity, input_gradient
from models.manifest import AidPreset, AidSpec
from models.recorded import Recorded


def fully_connected(inputs: int, outputs: int, *, norm: bool) -> list[nn.Module]:
    """Linear, batch norm where the layout has it, ReLU."""
    linear = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return [linear, *([nn.BatchNorm1d(outputs)] if norm else []), nn.ReLU(inplace=True)]


class AidDiscriminator(nn.Module):
    """Two taps, averaged over space, each through its own layers, then joint layers down to one logit.

    `code` layout: batch norm after every linear layer and joint layers that start as wide as both taps together
    (the released network without its dead encoders); `paper` layout: Table 4, no batch norm, joint layers that
    start at `width`. The networks take pooled features: `tap` makes them with the classifier, which is not a part.
    """

    def __init__(self, spec: AidSpec, tap_channels: Sequence[int]) -> None:
        super().__init__()
        norm = spec.layout == "code"
        self.encoders = nn.ModuleList()
        for channels in tap_channels:
            sizes = [channels] + [spec.width] * spec.tap_layers
            self.encoders.append(nn.Sequential(*_chain(sizes, norm=norm)))
        joined = len(tap_channels) * spec.width
        first = joined if norm else spec.width
        sizes = [joined, *(first // 2**level for level in range(spec.joint_layers))]
        self.joint = nn.Sequential(*_chain(sizes, norm=norm), nn.Linear(sizes[-1], 1))

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Logits (N,) of "natural" from the taps' pooled features [(N, C1), (N, C2)]."""
        encoded = [encoder(tap) for encoder, tap in zip(self.encoders, pooled, strict=True)]
        logits: Tensor = self.joint(torch.cat(encoded, dim=1))
        return logits.squeeze(1)


def _chain(sizes: Sequence[int], *, norm: bool) -> list[nn.Module]:
    layers = list[nn.Module]()
    for inputs, outputs in itertools.pairwise(sizes):
        layers += fully_connected(inputs, outputs, norm=norm)
    return layers


def pooled_taps(classifier: Classifier, images: Tensor, taps: Sequence[str]) -> list[Tensor]:
    """The taps' features averaged over space, [(N, C), ...]; nothing past the deeper tap runs."""
    return [tap.flatten(2).mean(2) if tap.dim() == 4 else tap for tap in classifier.features(images, taps)]


def tap_channels(classifier: Classifier, taps: Sequence[str], input_size: Sequence[int]) -> list[int]:
    """How many channels each tap has, found by one forward pass over a blank image."""
    device = classifier.normalize.mean.device
    with torch.no_grad():
        return [tap.shape[1] for tap in pooled_taps(classifier, torch.zeros(1, 3, *input_size, device=device), taps)]


class Aid(nn.Module):
    """The score of a classifier's images, natural or not. Holds the frozen classifier and its discriminator."""

    def __init__(self, classifier: Classifier, discriminator: AidDiscriminator, taps: Sequence[str]) -> None:
        super().__init__()
        self.classifier, self.discriminator, self.taps = classifier, discriminator, tuple(taps)

    def logits(self, images: Tensor) -> Tensor:
        """(N,), positive for natural; the sigmoid of it is D(x)."""
        logits: Tensor = self.discriminator(pooled_taps(self.classifier, images, self.taps))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """D(x), (N,) in [0, 1]: 1 natural, 0 adversarial."""
        return self.logits(images).sigmoid()


class AidPurifier(nn.Module):
    """Algorithm 2: signed steps that ascend D inside an l-inf ball around the received image."""

    is_random = False

    def __init__(self, aid: Aid, preset: AidPreset) -> None:
        super().__init__()
        self.aid, self.preset = aid, preset
        self._ascent: Callable[[Tensor], Tensor] = self._logit_gradient

    def record(self) -> None:
        """Have the steps for single images recorded (`models.recorded`); the networks must not change any more."""
        self._ascent = Recorded(self._ascent)

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Purified images, same shape, in [0, 1]; nothing is drawn, so `seeds` changes nothing.

        The gradient is that of the logit: it has the sign of D's own and does not vanish where D saturates.
        """
        received = images.detach()
        purified, (lower, upper) = received, ball(received, self.preset.eps)
        for _ in range(self.preset.steps):
            gradient = self._ascent(purified)
            purified = (purified + self.preset.step_size * gradient.sign()).clamp(lower, upper)
        return exact_identity(images, purified)

    def _logit_gradient(self, images: Tensor) -> Tensor:
        return input_gradient(self.aid.logits, images)

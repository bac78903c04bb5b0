"""ZeroPur (Liu et al., 2023; Algorithms 1 and 2 with their misprints corrected): purification without training.

Coarse shifting moves an image so that its embedding points where that of its own blurred copy does. Fine
alignment starts again from the received image and moves its features along the direction that coarse
shifting found. All of it happens in an l-inf ball around the received image, but for a preset without any step,
which is the blur alone.

Each forward pass ends at the deepest layer that is needed, the features of the received and of the coarse
image are computed once, and gradients go to images only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blur import blur
from models.classifiers import Classifier
from models.gradients import ball, exact_identity, input_gradient
from models.manifest import ZeroPurPreset
from models.randomness import uniform
from models.recorded import Recorded

Gradient = Callable[..., Tensor]


class ZeroPurPurifier(nn.Module):
    """ZeroPur on a frozen classifier; the classifier should be in eval mode."""

    def __init__(self, classifier: Classifier, preset: ZeroPurPreset) -> None:
        super().__init__()
        self.classifier, self.preset = classifier, preset
        self._ascent: Gradient = self._similarity_gradient
        self._alignment: Gradient = self._perceptual_gradient if preset.perceptual_weight else self._projection_gradient

    @property
    def is_random(self) -> bool:
        return self.preset.random_start

    def record(self) -> None:
        """Have the steps for single images recorded (`models.recorded`); the classifier must not change any more."""
        self._ascent, self._alignment = Recorded(self._ascent), Recorded(self._alignment)

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Purified images, same shape, in [0, 1]. `seeds` matter only to a preset with a random start."""
        if not self.preset.coarse_steps:
            return blur(images, self.preset.blur)
        received = images.detach()
        purified = self.coarse_shifting(received, seeds)
        if self.preset.fine_steps:
            purified = self.fine_alignment(received, purified)
        return exact_identity(images, purified)

    def coarse_shifting(self, received: Tensor, seeds: Sequence[int]) -> Tensor:
        """Algorithm 1: ascend cos(z(x), z(B(x))) through z(x) alone, z being the pooled embedding.

        With `coarse_layers` it is the sum over those, each flattened. The paper's mean (Eq. 12) has the same direction,
        and only that counts.
        """
        preset, shifted, (lower, upper) = self.preset, received, ball(received, self.preset.eps)
        if preset.random_start:
            start = 2 * uniform(seeds, received.shape[1:], received.device) - 1
            shifted = (received + preset.eps * start).clamp(lower, upper)
        velocity = torch.zeros_like(received)
        for _ in range(preset.coarse_steps):
            gradient = self._ascent(shifted, blur(shifted, preset.blur))
            if preset.momentum:
                velocity = l1_normalized(gradient) + preset.momentum * velocity
                gradient = velocity
            shifted = (shifted + preset.coarse_step_size * gradient.sign()).clamp(lower, upper)
        return shifted

    def fine_alignment(self, received: Tensor, coarse: Tensor) -> Tensor:
        """Algorithm 2: ascend sum_l <f_l(x'') - o_l, d_l>, d_l = f_l(coarse) - o_l, o_l = f_l(received).

        The gradient of that sum is the features' own, weighted by d_l: no loss is formed, and o_l drops out.
        The perceptual term of the later version (`perceptual_weight`) adds the gradient of self-LPIPS.
        """
        preset, layers = self.preset, self.preset.fine_layers
        start = received.detach().requires_grad_()
        with torch.enable_grad():
            features = self.classifier.features(start, layers)
        with torch.no_grad():
            target = self.classifier.features(coarse, layers)
        original = [layer.detach() for layer in features]
        directions = [target_ - original_ for target_, original_ in zip(target, original, strict=True)]
        ascent = directions
        if preset.perceptual_weight:
            directions = [preset.projection_weight * unit_projection(direction) for direction in directions]
            ascent = [lpips_features(original), *directions]

        # At step 0, x'' = x, whose features are there already; a perceptual distance and its gradient are zero.
        (gradient,) = torch.autograd.grad(features, start, grad_outputs=directions)
        aligned, (lower, upper) = received, ball(received, preset.eps)
        for step in range(preset.fine_steps):
            if step > 0:
                gradient = self._alignment(aligned, *ascent)
            aligned = (aligned + preset.fine_step_size * gradient.sign()).clamp(lower, upper)
        return aligned

    def _similarity_gradient(self, images: Tensor, blurred: Tensor) -> Tensor:
        """The gradient of cos(z(x), z(B(x))) through z(x) alone."""
        with torch.no_grad():
            targets = compared(self.classifier, blurred, self.preset)
        return input_gradient(lambda x: cosines(compared(self.classifier, x, self.preset), targets), images)

    def _projection_gradient(self, images: Tensor, *directions: Tensor) -> Tensor:
        """The gradient of the features' inner product with `directions`, layer by layer."""
        return input_gradient(lambda x: self.classifier.features(x, self.preset.fine_layers), images, directions)

    def _perceptual_gradient(self, images: Tensor, reference: Tensor, *directions: Tensor) -> Tensor:
        """The gradient of the weighted projection minus the weighted self-LPIPS distance to the received image.

        `reference` are the received image's LPIPS features.
        """

        def objective(x: Tensor) -> Tensor:
            features = self.classifier.features(x, self.preset.fine_layers)
            projection = torch.stack([dot(f, d) for f, d in zip(features, directions, strict=True)]).sum(0)
            distance: Tensor = (lpips_features(features) - reference).norm(dim=1)
            return projection - self.preset.perceptual_weight * distance

        return input_gradient(objective, images)


def compared(classifier: Classifier, images: Tensor, preset: ZeroPurPreset) -> list[Tensor]:
    """What coarse shifting makes alike for an image and its blurred copy: vectors (N, D), one per layer."""
    if not preset.coarse_layers:
        return [classifier.embedding(images)]
    return [layer.flatten(1) for layer in classifier.features(images, preset.coarse_layers)]


def cosines(vectors: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Layer by layer, the cosine of every image's vector and its target, (N,)."""
    return [F.cosine_similarity(vector, target) for vector, target in zip(vectors, targets, strict=True)]


def lpips_features(features: Sequence[Tensor]) -> Tensor:
    """Every layer divided by its channel norm and by sqrt(H * W), flattened and joined, (N, D)."""
    parts = [F.normalize(layer, dim=1).flatten(1) / layer[0, 0].numel() ** 0.5 for layer in features]
    return torch.cat(parts, dim=1)


def dot(features: Tensor, directions: Tensor) -> Tensor:
    """Inner product over all features of one image, (N,)."""
    return (features * directions).flatten(1).sum(1)


def unit_projection(direction: Tensor) -> Tensor:
    """d / |d|^2 per image, as in the intermediate-level attack, so that layers and images weigh alike."""
    squares = dot(direction, direction).clamp(min=1e-12)
    return direction / squares.view(-1, *([1] * (direction.dim() - 1)))


def l1_normalized(gradient: Tensor) -> Tensor:
    """Each image's gradient divided by its l1 norm; a zero gradient stays zero."""
    return gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)

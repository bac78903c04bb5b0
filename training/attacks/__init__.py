"""Attacks: images in [0, 1] and labels in, adversarial images inside a threat's ball and inside [0, 1] out."""

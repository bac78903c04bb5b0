"""Clarifier and other Python model servers: the same tiny network, photograph and clients, in one run."""

from __future__ import annotations


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    from benchmarks.peers.race import race  # here, so that the load generator starts without torch

    return race()

"""Stages are timed where somebody asks, and nowhere else."""

from __future__ import annotations

import time

import pytest
import torch

from models.stages import stage, timed_stages

CPU = torch.device("cpu")


def test_a_stage_is_the_sum_of_its_blocks() -> None:
    with timed_stages() as seconds:
        for _ in range(2):
            with stage("transform", CPU):
                time.sleep(0.01)
    assert seconds.keys() == {"transform"}
    assert seconds["transform"] >= 0.02


def test_without_anybody_who_asks_nothing_is_kept() -> None:
    with stage("transform", CPU):
        pass
    with timed_stages() as seconds:
        pass
    assert seconds == {}


def test_whoever_asks_inside_has_it_alone() -> None:
    with timed_stages() as outer:
        with timed_stages() as inner, stage("transform", CPU):
            pass
        assert inner.keys() == {"transform"}
    assert outer == {}


def test_an_error_goes_through() -> None:
    with timed_stages() as seconds, pytest.raises(ValueError, match="broken"), stage("transform", CPU):
        raise ValueError("broken")
    assert seconds == {}

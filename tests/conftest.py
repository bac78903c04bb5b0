"""What more than one folder of tests uses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Machines that run tests are often busy: an example may be slow, never wrong.
settings.register_profile("clarifier", deadline=None)
settings.load_profile("clarifier")

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device a test should run on: the CPU, and CUDA where there is one."""
    return torch.device(request.param)

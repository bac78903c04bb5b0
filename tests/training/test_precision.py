from __future__ import annotations

import pytest
import torch

from training.precision import Precision, autocast, computes_bfloat16


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_products_are_computed_in_the_precision_asked_for(
    precision: Precision, dtype: torch.dtype, device: torch.device
) -> None:
    matrix = torch.rand(4, 4, device=device)
    with autocast(device, precision):
        assert (matrix @ matrix).dtype == dtype
    assert (matrix @ matrix).dtype == torch.float32


@pytest.mark.parametrize(("capability", "computes"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_a_cpu_that_emulates_bfloat16_is_known(
    capability: str, computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert computes_bfloat16(torch.device("cpu")) is computes
    assert computes_bfloat16(torch.device("cuda:0"))

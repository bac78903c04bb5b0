from __future__ import annotations

import pytest
import torch

from training.precision import autocast


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_products_are_computed_in_the_precision_asked_for(
    precision: str, dtype: torch.dtype, device: torch.device
) -> None:
    matrix = torch.rand(4, 4, device=device)
    with autocast(device, precision):
        assert (matrix @ matrix).dtype == dtype
    assert (matrix @ matrix).dtype == torch.float32

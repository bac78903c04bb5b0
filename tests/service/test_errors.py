"""What every error says of itself."""

from __future__ import annotations

import re

from service.errors import ClarifierError
from service.problems import classes


def test_every_error_has_a_code_of_its_own_a_title_and_a_paragraph() -> None:
    errors = list(classes())
    assert len(errors) > 20
    assert len({error.code for error in errors}) == len(errors)
    for error in errors:
        assert re.fullmatch("[a-z0-9_]+", error.code)
        assert 400 <= error.status <= 504
        assert error.title != ClarifierError.title
        assert len(error.__doc__ or "") > 20, "its page"

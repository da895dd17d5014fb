"""Errors of libraries, quoted in messages."""

import pytest

from lm_lightning.errors import one_line


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (ValueError("x" * 600), "x" * 500),
        (EOFError(), "EOFError"),  # a message would end with empty parentheses
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_an_error_is_quoted_in_one_line(error: Exception, text: str):
    assert one_line(error) == text

"""What a peer sends is checked before it is used: a faulty one must neither write on a terminal nor end a run."""

from __future__ import annotations

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multi_process import messages
from multi_process.boundary import clean_text
from perfedavg.plain_values import from_plain


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("no space left on device", "no space left on device"),
        ("Größe 3 ≠ 4", "Größe 3 ≠ 4"),
        ("one\nserver: lost worker 2 (it died); 0 left", "one server: lost worker 2 (it died); 0 left"),
        ("a\r\t\v\u2028\u0085 b", "a b"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\u202ereversed", "\\u202ereversed"),
        ("\ud800", "\\ud800"),
        (None, "None"),
    ],
)
def test_texts_of_peers_are_one_printable_line(text: object, clean: str) -> None:
    """A newline would forge a line of the log, an escape sequence would write anywhere on the terminal."""
    assert clean_text(text) == clean


@given(st.text(), st.integers(4, 50))
def test_whatever_a_peer_writes_is_printable_and_short(text: str, max_chars: int) -> None:
    clean = clean_text(text, max_chars)
    assert len(clean) <= max_chars
    assert clean.isprintable()
    assert clean_text(clean, max_chars) == clean


def test_a_long_text_is_cut() -> None:
    assert clean_text("x" * 10_000_000) == "x" * 497 + "..."
    assert clean_text(" " * 10_000_000 + "x", 10) == "..."
    assert clean_text("\x1b" * 6, 10) == "\\x1b\\x1..."


KINDS = {**messages._PACKAGED, **messages._CONTROL_MESSAGES}


@pytest.mark.parametrize(
    ("kind", "field"), [(name, field.name) for name, kind in KINDS.items() for field in dataclasses.fields(kind)]
)
def test_every_field_of_every_message_is_checked(kind: str, field: str) -> None:
    """One that is not would be used as it comes. No field is a nested list of nothing, nor a number beyond all."""
    for value in ([[[[]]]], 10**30, -1, True):
        with pytest.raises(ValueError, match=field):
            from_plain(typing.get_type_hints(KINDS[kind], include_extras=True)[field], value, field)

"""The boundary: what a peer sends is checked here, by rules that read like a list, before anything uses it."""

from __future__ import annotations

MAX_TEXT_CHARS = 500


def clean_text(text: object, max_chars: int = MAX_TEXT_CHARS) -> str:
    """A peer's text, fit for a terminal, a log and a result: one line of at most so many characters, all printable.

    White space becomes single blanks, so that no line can be forged. Whatever else cannot be printed (escape sequences
    of terminals, marks that turn the direction of writing) is shown by its code, such as `\\x1b`.
    """
    content = text if isinstance(text, str) else str(text)
    words = " ".join(content[: 2 * max_chars].split())
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    return shown if len(shown) <= max_chars and len(content) <= 2 * max_chars else f"{shown[: max_chars - 3]}..."

# SPDX-License-Identifier: Apache-2.0
"""Which vocabulary tokens are delimiters, and of which class; judged by their text alone."""

from __future__ import annotations

import enum

_SENTENCE_MARKS = ".!?…。！？"  # noqa: RUF001 (full-width marks are meant)
_PAUSE_MARKS = {";": "；", ":": "：", ",": "，、"}  # noqa: RUF001
_OPENERS = "([{“‘"  # noqa: RUF001
_CLOSERS = ")]}”’"  # noqa: RUF001
_CLOSER_OF = dict(zip(_OPENERS, _CLOSERS, strict=True))
_STRAIGHT_QUOTES = "\"'"
_PAUSES = "".join(mark + wide for mark, wide in _PAUSE_MARKS.items())
_DELIMITERS = frozenset(_SENTENCE_MARKS + _PAUSES + _OPENERS + _CLOSERS + _STRAIGHT_QUOTES)


class DelimiterClass(enum.Enum):
    """Classes in falling order of what they separate; also the order of fallback."""

    PARAGRAPH = "paragraph"  # two or more newlines
    LINE = "line"  # one newline
    SENTENCE = "sentence"  # closes a sentence
    SEMICOLON = "semicolon"
    COLON = "colon"
    COMMA = "comma"
    CLOSER = "closer"  # closing brackets and quotes only


def _leaves_bracket_open(text: str) -> bool:
    expected: list[str] = []
    for char in text:
        if char in _CLOSER_OF:
            expected.append(_CLOSER_OF[char])
        elif expected and char == expected[-1]:
            expected.pop()
    return bool(expected)


def classify(text: str) -> DelimiterClass | None:
    """The delimiter class of a token's text, or None when the token is no boundary.

    A boundary is a run of delimiter characters and white space. White space alone counts when it
    holds a newline. No boundary: a token that leaves a bracket or curly quote open, and straight
    quotes behind a space, which open a quotation.
    """
    marks = "".join(text.split())
    if not marks:
        newlines = max(text.count("\n"), text.count("\r"))
        if newlines == 0:
            return None
        return DelimiterClass.LINE if newlines == 1 else DelimiterClass.PARAGRAPH
    if not _DELIMITERS.issuperset(marks) or _leaves_bracket_open(marks):
        return None
    if text[0] == " " and not marks.strip(_STRAIGHT_QUOTES):
        return None
    last_sentence = max(marks.rfind(mark) for mark in _SENTENCE_MARKS)
    last_pause = max(marks.rfind(mark) for mark in _PAUSES)
    if last_sentence > last_pause:
        return DelimiterClass.SENTENCE
    for mark, kind in (
        (";", DelimiterClass.SEMICOLON),
        (":", DelimiterClass.COLON),
        (",", DelimiterClass.COMMA),
    ):
        if any(char in marks for char in mark + _PAUSE_MARKS[mark]):
            return kind
    return DelimiterClass.CLOSER


def ends_sentence(kind: DelimiterClass) -> bool:
    """Whether a sentence-splitting policy cuts behind this class."""
    return kind in (DelimiterClass.PARAGRAPH, DelimiterClass.LINE, DelimiterClass.SENTENCE)


def escape(token: bytes) -> str:
    r"""Writes raw token bytes in ASCII without comma, quotation mark or line break.

    `\n`, `\r`, `\t`, `\\` for these four; `\xHH` for comma, `"` and every byte outside 0x20..0x7E.
    """
    named = {0x0A: r"\n", 0x0D: r"\r", 0x09: r"\t", 0x5C: r"\\"}
    plain = set(range(0x20, 0x7F)) - {0x22, 0x2C}
    return "".join(
        named.get(byte) or (chr(byte) if byte in plain else f"\\x{byte:02x}") for byte in token
    )

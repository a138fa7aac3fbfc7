"""Texts of tables, spoilt at one place."""

from __future__ import annotations


def edited(text: str, line: int, old: str, new: str) -> str:
    """The text with something else at one place of a line, counted from 1."""
    lines = text.splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    return "\n".join(lines) + "\n"

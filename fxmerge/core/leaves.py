"""What lies in a nested value: containers that torch knows are opened, and so are dataclasses, which it does not know by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils import _pytree as pytree


def leaves(value: Any) -> list[Any]:
    """All that is no container, in order.

    >>> leaves({"a": [1, (2, None)], "b": 3})
    [1, 2, None, 3]
    """
    return [leaf for _, leaf in named_leaves(value)]


def named_leaves(value: Any) -> list[tuple[str, Any]]:
    """The same, each behind the text that leads to it.

    >>> named_leaves({"a": [1, 2]})
    [("['a'][0]", 1), ("['a'][1]", 2)]
    """
    return list(_named("", value))


def _named(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    for inner, leaf in _with_keys(value):
        where = path + pytree.keystr(inner)
        if is_dataclass(leaf) and not isinstance(leaf, type):
            for part in fields(leaf):
                yield from _named(f"{where}.{part.name}", getattr(leaf, part.name))
        else:
            yield where, leaf


def _with_keys(value: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Leaves behind their keys; by number, where a container was made known to torch without keys."""
    try:
        return pytree.tree_flatten_with_path(value)[0]
    except ValueError:
        return [((pytree.SequenceKey(number),), leaf) for number, leaf in enumerate(pytree.tree_leaves(value))]

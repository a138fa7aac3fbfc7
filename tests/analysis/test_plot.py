"""Fronts become pictures; what is missing is told."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fxmerge.analysis import plot
from fxmerge.analysis.plot import plot_front
from fxmerge.core.plan import ParetoFront
from fxmerge.errors import InputError

FRONT = ParetoFront("f", (2_000_000, 3_000_000), (0.5, 0.0), (), 4_000_000, lambda index: ())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are made."""
    pytest.importorskip("matplotlib")
    figure, canvas = plot._matplotlib()
    made: list[Any] = []

    def keep(**options: Any) -> Any:
        made.append(figure(**options))
        return made[-1]

    monkeypatch.setattr(plot, "_matplotlib", lambda: (keep, canvas))
    return made


def points(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.get_lines()}


def test_front_picked_original_and_measured_are_drawn_in_milliseconds(drawn: list[Any], tmp_path: Path) -> None:
    plot_front(FRONT, tmp_path / "f.png", picked=FRONT.plan(0), measured=[(2_100_000, 0.6)], title="resnet")
    axes = drawn[0].axes[0]
    assert points(axes) == {
        "2 plans": [(2.0, 0.5), (3.0, 0.0)],
        "original, folded": [(4.0, 0.0)],
        "picked": [(2.0, 0.5)],
        "measured": [(2.1, 0.6)],
    }
    assert (axes.get_title(), axes.get_ylabel()) == ("resnet", "loss (sum over merges)")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_pick_there_is_front_and_original(drawn: list[Any], tmp_path: Path) -> None:
    plot_front(replace(FRONT, objective="layermerge"), tmp_path / "f.svg")
    assert set(points(drawn[0].axes[0])) == {"2 plans", "original, folded"}
    assert drawn[0].axes[0].get_ylabel() == "layers less the sum of exp(change)"
    assert "<svg" in (tmp_path / "f.svg").read_text()


def test_amounts_of_a_second_resource_become_colours(drawn: list[Any], tmp_path: Path) -> None:
    plot_front(replace(FRONT, second="parameters", amounts=(7, 9)), tmp_path / "f.png", picked=[FRONT.plan(0), FRONT.plan(1)])
    (dots,) = drawn[0].axes[0].collections
    assert dots.get_array().tolist() == [7, 9]
    assert drawn[0].axes[1].get_ylabel() == "parameters"
    assert points(drawn[0].axes[0])["picked"] == [(2.0, 0.5), (3.0, 0.0)]


def test_a_file_of_unknown_kind_is_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=r"cannot draw into .*f\.xyz: .* End it in \.png"):
        plot_front(FRONT, tmp_path / "f.xyz")


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(InputError, match=r"plots need matplotlib: pip install 'fxmerge\[plot\]'"):
        plot_front(FRONT, tmp_path / "f.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"front": "f"}, "front must be a ParetoFront, such as solve.. gives, found 'f'"),
        ({"path": 3}, "path must be that of a file, title a text; found 3, ''"),
        ({"title": 3}, "title a text; found .*, 3"),
        ({"picked": 3}, "picked must be a Plan or a sequence of them, found 3"),
        ({"picked": [None]}, "picked must be a Plan or a sequence of them, found .None."),
        ({"measured": 3}, "measured must be pairs .nanoseconds, loss., found 3"),
        ({"measured": [3]}, "measured must be pairs"),
        ({"measured": [(3, "x")]}, "measured must be pairs"),
    ],
)
def test_what_is_of_another_kind_is_told(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        plot_front(**{"front": FRONT, "path": tmp_path / "f.png", **options})

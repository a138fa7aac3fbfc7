"""Bars show how much is done of how much, with an estimate of the time left; where nobody asked, there are none."""

from __future__ import annotations

import pytest

from fxmerge.measure.progress import Bars


def test_a_bar_says_what_is_done_of_how_much_and_how_long_it_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(True) as bars:
        told = bars("latency")
        told(0, 8)
        told(4, 8)
        told(8, 8)
    shown = capsys.readouterr().err
    assert "latency" in shown
    assert "0/8" in shown
    assert "8/8" in shown
    assert "00:00<" in shown  # time taken, and time left


def test_a_stage_that_is_done_leaves_its_line_to_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(True) as bars:
        for number in range(40):
            told = bars(f"stage {number}")
            told(1, 2)
            told(2, 2)
        told(1, 2)  # another round of the last
    shown = capsys.readouterr().err
    assert "\x1b[A" not in shown  # no line above the lowest
    assert "more hidden" not in shown
    assert shown.count("2/2") == 40


def test_without_them_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(False) as bars:
        told = bars("latency")
        told(1, 2)
    assert capsys.readouterr() == ("", "")

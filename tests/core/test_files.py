"""Files are whole or not there, whoever else writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fxmerge.core.files import replacing, write_csv, write_whole


def test_two_who_write_one_file_at_a_time_both_finish_and_the_last_stays(tmp_path: Path) -> None:
    with replacing(tmp_path / "t") as one, replacing(tmp_path / "t") as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "t").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[int]]:
        yield (1,)
        raise OSError("the disk is full")

    write_csv(tmp_path / "t.csv", ("n",), [(0,)])
    with pytest.raises(OSError, match="the disk is full"):
        write_csv(tmp_path / "t.csv", ("n",), rows())
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        write_whole(tmp_path / "t.csv", "n\n" * 100_000 + "\ud800")
    with pytest.raises(OSError, match=r"\.part"):
        write_whole(tmp_path / "none" / "t.csv", "")
    assert (tmp_path / "t.csv").read_text() == "n\n0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_a_file_may_be_read_by_whom_others_may(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_whole(tmp_path / "t", "")
    assert (tmp_path / "t").stat().st_mode == (tmp_path / "plain").stat().st_mode

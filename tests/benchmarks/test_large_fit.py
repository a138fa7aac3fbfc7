from __future__ import annotations

from benchmarks import large_fit


def test_the_largest_candidate_is_fitted_and_its_cost_told() -> None:
    report = large_fit.main(["--channels", "4", "--images", "32", "--size", "6"])
    *_, row = report.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert "fitted 4->4 5x5" in cells[0]
    assert cells[1] == "100"
    assert 0 < float(cells[3]) <= float(cells[4])

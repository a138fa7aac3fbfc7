"""The forms that a kernel could take: all are maps between the same tensors, and each is timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import forms


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("entering", "leaving"), [(8, 8), (8, 16)])
def test_every_form_gives_what_the_dense_kernel_gives_in_size(entering: int, leaving: int, kernel: int) -> None:
    made = dict(forms.forms(entering, leaving, kernel))
    sizes = {name: form(torch.zeros(2, entering, 9, 7)).shape for name, form in made.items()}
    assert set(sizes.values()) == {torch.Size((2, leaving, 9, 7))}
    count = {name: sum(p.numel() for p in form.parameters()) for name, form in made.items()}
    assert max(count, key=count.__getitem__) == "dense"


def test_every_shape_gets_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "SHAPES", ((4, 8, 6), (8, 8, 6)))
    report = forms.main(["--batch", "1", "--kernels", "3"])
    rows = [line for line in report.splitlines() if line.startswith("| ") and "->" in line]
    assert [row.split("|")[1].strip() for row in rows] == ["4->8, 6x6, 3x3", "8->8, 6x6, 3x3"]
    assert all(float(cell) > 0 for row in rows for cell in row.split("|")[2:-1])

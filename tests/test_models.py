"""A fixed sample of the zoo: read, everything in it told of, and the law held by three random plans (``benchmarks/zoo``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.zoo import readme
from benchmarks.zoo.check import PLANS, examine
from benchmarks.zoo.models import Entry, entries
from benchmarks.zoo.report import law_text

SAMPLE = (
    "torchvision:convnext_tiny",
    "torchvision:densenet121",
    "torchvision:efficientnet_b0",
    "torchvision:mnasnet0_5",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_large",
    "torchvision:regnet_x_400mf",
    "torchvision:regnet_y_400mf",
    "torchvision:resnet18",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_0",
    "torchvision:swin_t",
    "torchvision segmentation:lraspp_mobilenet_v3_large",
    "torchvision detection, backbone:ssdlite320_mobilenet_v3_large",
    "torchvision detection, backbone:fasterrcnn_mobilenet_v3_large_fpn",
    "torchvision quantizable:resnet18",
)


def test_the_sample_is_in_the_zoo() -> None:
    assert set(SAMPLE) <= {entry.id for entry in entries()}


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_is_read_and_the_law_holds(name: str) -> None:
    entry: Entry = next(entry for entry in entries() if entry.id == name)
    row = {}
    for news in examine(entry, 8.0, alone=False):
        row.update(news)
    assert row["stage"] == "done"
    assert row["untold"] == []
    assert law_text(row) == "held"
    assert len(row["errors"]) == PLANS


def test_the_readme_has_the_tables_of_the_recorded_run_and_of_all_reasons(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    text = (root / "README.md").read_text(encoding="utf-8")
    report = (root / "benchmarks" / "results" / "zoo.md").read_text(encoding="utf-8")
    assert readme.table(report) in text
    assert readme.reasons() in text
    (tmp_path / "README.md").write_text(text)
    readme.put(tmp_path / "README.md", report.replace("| timm | 199 |", "| timm | 200 |"))
    assert (tmp_path / "README.md").read_text() == text.replace("| timm | 216 |", "| timm | 217 |")

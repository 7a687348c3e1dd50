"""The benchmarks run and write rows that name their machine; what they measure is never
asserted.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs a script with a folder of its own for results; gives the rows written."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(importlib.import_module("reports"), "RESULTS", tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(name).main()
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


def test_an_iteration_is_measured_for_each_engine_anew(measure):
    options = "--models lenet --batch-sizes 1 --attacks IG --engines eager traced --iterations 4"
    measure("iteration", *options.split())
    rows = measure("iteration", *options.split())  # takes the place of the first measurement
    assert [row["engine"] for row in rows] == ["eager", "traced"]
    assert all(row["passes"] > 0 for row in rows)
    assert all(row["machine"] and row["versions"] and row["date"] for row in rows)


def test_memory_is_measured_whole_and_in_chunks(measure):
    options = "--batch-size 2 --image-size 32 --chunks 0 1 --threads 1"
    rows = measure("memory", *options.split())
    measured = [(row["engine"], row["chunk size"]) for row in rows]
    assert measured == [("traced", 2), ("traced", 1), ("eager", 2)]


def test_the_page_of_engines_holds_what_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    report = importlib.import_module("report")
    page = (FOLDER.parent / "docs" / "engines.md").read_text()
    assert report.SECTION.search(page)[0] == report.section(), "run python benchmarks/report.py"

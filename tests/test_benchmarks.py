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


def test_an_iteration_is_measured_for_each_engine(measure):
    arguments = [
        "--models",
        "lenet",
        "--batch-sizes",
        "1",
        "--attacks",
        "IG",
        "--engines",
        "eager",
        "traced",
        "--iterations",
        "4",
    ]
    rows = measure("iteration", *arguments)
    assert [row["engine"] for row in rows] == ["eager", "traced"]
    assert all(
        row["passes"] > 0 and row["machine"] and row["versions"] and row["date"] for row in rows
    )
    assert (
        len(measure("iteration", *arguments)) == 2
    )  # a new measurement takes the place of the old one


def test_attacks_at_once_are_measured(measure):
    [row] = measure(
        "together",
        "--models",
        "lenet",
        "--batch-sizes",
        "1",
        "--attacks",
        "2",
        "--iterations",
        "2",
        "--repetitions",
        "1",
    )
    assert row["attacks"] == 2 and row["speed-up"] > 0


def test_memory_is_measured_whole_and_in_chunks(measure):
    rows = measure(
        "memory", "--batch-size", "2", "--image-size", "32", "--chunks", "0", "1", "--threads", "1"
    )
    assert [(row["engine"], row["chunk size"]) for row in rows] == [
        ("traced", 2),
        ("traced", 1),
        ("eager", 2),
    ]


def test_the_readme_holds_what_is_measured(measure):
    report = importlib.import_module("report")
    assert report.SECTION.search((FOLDER.parent / "README.md").read_text())

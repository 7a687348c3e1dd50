"""Where the benchmarks write what they measured: benchmarks/results/NAME.json, a list
of rows that each name their machine.
"""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu", threads: int = 1) -> dict[str, str]:
    """The machine, the versions that matter and the date."""
    cpu = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''} of {os.cpu_count()}"
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "CPU",
    )


def read_rows(name: str) -> list[dict]:
    """The rows measured so far; none before the first run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def write_rows(name: str, rows: list[dict], keys: tuple[str, ...]) -> None:
    """Add rows to those measured so far; a row replaces one that agrees with it in all
    `keys`.
    """
    known = {tuple(row[key] for key in keys): row for row in [*read_rows(name), *rows]}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(known.values()), indent=1, ensure_ascii=False) + "\n")
    print(f"Written to {path}")

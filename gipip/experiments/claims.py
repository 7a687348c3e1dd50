"""What the notebooks found about the paper's claims, as tables and pages.

Six *endpoints*, one a claim (endpoints.py), were fixed before they were measured: they
alone get a verdict, corrected for their number. Every other comparison is *secondary*:
it gets an interval. A notebook saves both as tables; `make reproduce` joins them and
writes README.md and docs/claims.md.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import pandas

from gipip.errors import DataError
from gipip.evaluation.statistics import Interval, holm
from gipip.experiments.endpoints import NOT_MEASURED, STUDY, Endpoint


class Comparison(NamedTuple):
    """A secondary comparison: an interval, and no verdict.

    `about`: the number of the claim that it belongs to. `compared`: as "GIPIP − IG,
    equal λTV, convnet16, B = 4".
    """

    about: int
    compared: str
    metric: str  # as "psnr"
    images: int
    difference: Interval  # its count is the number of independent batches

    def row(self) -> dict:
        """Of the comparisons' table."""
        about = f"{self.about} {STUDY[self.about].claim}"
        return {"claim": about, **self._asdict(), **self.difference._asdict()}


_NUMBERS: dict[str, type] = {"mean": float, "low": float, "high": float}
_ENDPOINTS: dict[str, type] = dict.fromkeys(("claim", "endpoint", "metric", "model", "units"), str)
_ENDPOINTS |= {**_NUMBERS, "p": float, "obstacle": str}
_COMPARISONS: dict[str, type] = dict.fromkeys(("claim", "compared", "metric"), str)
_COMPARISONS |= {"images": int, "count": int, **_NUMBERS}
_TABLES = {"endpoints": _ENDPOINTS, "comparisons": _COMPARISONS}


def save_findings(
    notebook: str,
    endpoints: Sequence[Endpoint],
    comparisons: Sequence[Comparison],
    folder: Path | str,
) -> dict[str, pandas.DataFrame]:
    """Write `folder`/`notebook`_endpoints.csv and …_comparisons.csv, each whole or not
    at all; gives the tables. Raises ValueError for two comparisons of the same by the
    same metric.
    """
    tables = {}
    for name, found in (("endpoints", endpoints), ("comparisons", comparisons)):
        columns = list(_TABLES[name])
        tables[name] = pandas.DataFrame([each.row() for each in found], columns=columns)
    repeated = tables["comparisons"].duplicated(["claim", "compared", "metric"])
    if repeated.any():
        names = ", ".join(tables["comparisons"]["compared"][repeated])
        raise ValueError(f"{notebook!r} compares the same twice: {names}.")
    for name, table in tables.items():
        _write_table(Path(folder) / f"{notebook}_{name}.csv", table)
    return tables


def collect_findings(folder: Path | str) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """What all notebooks found, joined as `folder`/claims.csv, a row for each claim of
    STUDY with its verdict, and `folder`/comparisons.csv.

    Nothing is written when no notebook has saved anything. Raises DataError for a file
    that `save_findings` did not write.
    """
    endpoints, comparisons = (_read_all(Path(folder), name) for name in _TABLES)
    judged = _judged(endpoints)
    if len(endpoints) or len(comparisons):
        _write_table(Path(folder) / "claims.csv", judged)
        _write_table(Path(folder) / "comparisons.csv", comparisons)
    return judged, comparisons


def _read_all(folder: Path, name: str) -> pandas.DataFrame:
    tables = [pandas.DataFrame(columns=list(_TABLES[name]))]
    tables += [_read(path, _TABLES[name]) for path in sorted(folder.glob(f"[0-9]*_{name}.csv"))]
    joined = pandas.concat([table for table in tables if len(table)] or tables)
    return joined.sort_values("claim", kind="stable", ignore_index=True)


def _read(path: Path, columns: dict[str, type]) -> pandas.DataFrame:
    try:  # as text first, for numbers that are exact to the last digit
        table = pandas.read_csv(path, dtype=str, keep_default_na=False)
        return table[list(columns)].astype(columns)
    except (KeyError, ValueError) as error:  # a column missing; no number, no CSV
        expected = f"Expected the columns {', '.join(columns)}; run its notebook."
        raise DataError(f"{path} is no table of findings ({error}). {expected}") from error


def _judged(endpoints: pandas.DataFrame) -> pandas.DataFrame:
    """A row for each claim of STUDY, with p-values corrected for their number, and verdicts.

    A claim that cannot be judged counts as one whose p-value is 1.
    """
    claims = [f"{number} {planned.claim}" for number, planned in STUDY.items()]
    table = endpoints.set_index("claim").reindex(claims)
    for name in ("endpoint", "metric"):
        table[name] = [getattr(planned, name) for planned in STUDY.values()]
    table["obstacle"] = table["obstacle"].fillna(NOT_MEASURED)
    decisive = table["p"].where(table["obstacle"] == "")
    corrected = numpy.array(holm(decisive.abs()))
    decided = numpy.where(decisive > 0, "supported", "contradicted")
    verdicts = numpy.where(corrected < 0.05, decided, "undecided")
    table["p, Holm"] = numpy.where(table["obstacle"] == "", corrected, numpy.nan)
    table["verdict"] = table["obstacle"].where(table["obstacle"] != "", verdicts)
    return table.drop(columns="obstacle").reset_index()


def write_findings(
    readme: Path | str, claims: pandas.DataFrame, comparisons: pandas.DataFrame
) -> bool:
    """Write the table of claims between the marker lines of `readme`, and with every
    comparison between those of docs/claims.md beside it: what `collect_findings` gives.

    Equal tables give equal bytes. A file without such lines, or that is not there, is
    left alone: False if it is `readme`.
    """
    readme = Path(readme)
    shown = claims.assign(difference=_differences(claims))
    shown = shown[["claim", "endpoint", "metric", "model", "units", "difference", "verdict"]]
    table = _markdown(shown.fillna("–"))
    parts = [f"## Primary endpoints\n\n{table}"]
    for claim, rows in comparisons.groupby("claim"):
        rows = rows.assign(difference=_differences(rows)).rename(columns={"count": "batches"})
        listed = rows[["compared", "metric", "images", "batches", "difference"]]
        parts.append(f"## {claim}\n\n{_markdown(listed)}")
    _fill(readme.parent / "docs" / "claims.md", "\n".join(parts))
    return _fill(readme, table)


def _differences(table: pandas.DataFrame) -> list[str]:
    """Means with their intervals; a dash where nothing was measured."""
    texts = []
    for row in table.to_dict("records"):
        interval = Interval(row["mean"], row["low"], row["high"], 0)
        text = f"{interval:+.2f} dB" if row["metric"] == "psnr" else f"{interval:+.3f}"
        texts.append("–" if math.isnan(row["mean"]) else text)
    return texts


def _markdown(table: pandas.DataFrame) -> str:
    rows: list = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


_SECTION = re.compile(
    r"(?<=^<!-- claims: written by make reproduce -->\n).*?(?=^<!-- end of claims -->$)",
    re.DOTALL | re.MULTILINE,
)


def _fill(path: Path, section: str) -> bool:
    """Put a section between the marker lines of a file; False if it has none."""
    text = path.read_bytes().decode() if path.is_file() else ""
    if not _SECTION.search(text):
        return False
    _write(path, _SECTION.sub(lambda _: f"\n{section}\n", text, count=1))
    return True


def _write_table(path: Path, table: pandas.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, table.to_csv(index=False, na_rep="nan", lineterminator="\n"))


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_bytes(text.encode())
    os.replace(draft, path)

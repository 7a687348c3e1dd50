"""What the notebooks say about the paper's claims: a table a notebook, one table of
all, and the sections of README.md and docs/claims.md that show it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas

from gipip.errors import DataError
from gipip.evaluation.statistics import Interval, verdict
from gipip.experiments.results import Results

_COLUMNS = {
    **dict.fromkeys(("claim", "compared", "metric"), str),
    **dict.fromkeys(("images", "batches"), int),
    **dict.fromkeys(("mean", "low", "high"), float),
    "verdict": str,
}
_SECTION = re.compile(
    r"(?<=^<!-- claims: written by make reproduce -->\n).*?(?=^<!-- end of claims -->$)",
    re.DOTALL | re.MULTILINE,
)
_VERDICTS = ("supported", "not supported", "undecided at this scale")


class Claim(NamedTuple):
    """One comparison that judges a claim of the paper. A positive difference must speak
    for the claim: of LPIPS, the other way round.
    """

    claim: str  # of the paper, as "1 The anomaly score improves inversion"
    compared: str  # as "GIPIP − IG, equal λTV, convnet16, B = 4"
    metric: str  # as "psnr"
    images: int
    difference: Interval  # its count is the number of independent batches

    @property
    def verdict(self) -> str:
        """Supported, not supported, or undecided."""
        return verdict(self.difference)


def compare(
    results: Results,
    claim: str,
    compared: str,
    a: Mapping,
    b: Mapping,
    metrics: Sequence[str] = ("psnr", "ssim"),
) -> list[Claim]:
    """A Claim for each metric: the paired difference a − b of the results that `a` and
    `b` select (see `Results.difference`).
    """
    images = len(results.select(**a).frame())
    return [Claim(claim, compared, m, images, results.difference(a, b, m)) for m in metrics]


def save_claims(name: str, claims: Sequence[Claim], folder: Path | str) -> pandas.DataFrame:
    """Write `folder`/`name`_claims.csv, whole or not at all, and return its table: a
    row a claim.

    `name`: the notebook's, as "03_ablations". Raises ValueError for a name without a
    number, for no claims, and for two of the same claim, comparison and metric.
    """
    rows = [(*c[:4], c.difference.count, *c.difference[:3], c.verdict) for c in claims]
    table = pandas.DataFrame(rows, columns=list(_COLUMNS))
    if not re.match(r"\d\d_", name) or table.empty:
        expected = "Expected claims, and a notebook's name such as '03_ablations'"
        raise ValueError(f"{expected}; found {len(table)} claims of {name!r}.")
    repeated = table[table.duplicated(["claim", "compared", "metric"])]
    if len(repeated):
        names = ", ".join(repeated["compared"] + " by " + repeated["metric"])
        raise ValueError(f"{name!r} judges the same twice: {names}.")
    return _write_table(Path(folder) / f"{name}_claims.csv", table)


def collect_claims(folder: Path | str) -> pandas.DataFrame:
    """All claims of `folder`, in order of claim, then notebook, written to
    `folder`/claims.csv; without any, an empty table and no file.

    Raises DataError for a file that `save_claims` did not write.
    """
    tables = [_read(path) for path in sorted(Path(folder).glob("[0-9][0-9]_*claims.csv"))]
    if not tables:
        return pandas.DataFrame(columns=list(_COLUMNS))
    table = pandas.concat(tables).sort_values("claim", kind="stable", ignore_index=True)
    return _write_table(Path(folder) / "claims.csv", table)


def _read(path: Path) -> pandas.DataFrame:
    try:  # as text first, for numbers that are exact to the last digit
        return pandas.read_csv(path, dtype=str)[list(_COLUMNS)].astype(_COLUMNS)
    except (KeyError, ValueError) as error:  # a column missing; no number, no CSV
        expected = f"Expected the columns {', '.join(_COLUMNS)}; run its notebook."
        raise DataError(f"{path} is no table of claims ({error}). {expected}") from error


def write_readme_section(readme: Path | str, table: pandas.DataFrame) -> bool:
    """Write a row a claim between the two marker lines of `readme`, and every
    comparison between those of docs/claims.md beside it.

    Equal tables give equal bytes. A file without such lines, or that is not there, is
    left alone: False if it is `readme`.
    """
    readme = Path(readme)
    counts = pandas.crosstab(table["claim"], table["verdict"])
    counts = counts.reindex(columns=_VERDICTS, fill_value=0).reset_index()
    whole = [f"## {claim}\n\n{_markdown(_shown(rows))}" for claim, rows in table.groupby("claim")]
    _fill(readme.parent / "docs" / "claims.md", "\n".join(whole))
    return _fill(readme, _markdown(counts))


def _shown(rows: pandas.DataFrame) -> pandas.DataFrame:
    shown = rows[["compared", "metric", "images", "batches", "verdict"]]
    shown.insert(4, "difference", rows.apply(_difference, axis=1))
    return shown


def _difference(row: pandas.Series) -> str:
    difference = Interval(row["mean"], row["low"], row["high"], row["batches"])
    return f"{difference:+.2f} dB" if row["metric"] == "psnr" else f"{difference:+.3f}"


def _markdown(table: pandas.DataFrame) -> str:
    rows: list = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _fill(path: Path, section: str) -> bool:
    """Put a section between the marker lines of a file; False if it has none."""
    text = path.read_bytes().decode() if path.is_file() else ""
    if not _SECTION.search(text):
        return False
    _write(path, _SECTION.sub(lambda _: f"\n{section}\n", text, count=1))
    return True


def _write_table(path: Path, table: pandas.DataFrame) -> pandas.DataFrame:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, table.to_csv(index=False, lineterminator="\n"))
    return table


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_bytes(text.encode())
    os.replace(draft, path)

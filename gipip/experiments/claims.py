"""What the notebooks say about the paper's claims: a table a notebook, one table of
all, and the section of README.md that shows it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from gipip.errors import DataError
from gipip.evaluation.statistics import Interval, verdict
from gipip.experiments.sweep import Results

_COLUMNS = dict(
    claim=str,
    compared=str,
    metric=str,
    images=int,
    batches=int,
    mean=float,
    low=float,
    high=float,
    verdict=str,
)
_SECTION = re.compile(
    r"(?<=^<!-- claims: written by make reproduce -->\n).*?(?=^<!-- end of claims -->$)",
    re.DOTALL | re.MULTILINE,
)
_HEADER = [
    "| compared | metric | images / batches | difference | verdict |",
    "|---|---|---|---|---|",
]


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
    return [
        Claim(claim, compared, metric, images, results.difference(a, b, metric))
        for metric in metrics
    ]


def save_claims(name: str, claims: Sequence[Claim], folder: Path | str) -> pd.DataFrame:
    """Write `folder`/`name`_claims.csv, whole or not at all, and return its table: a
    row a claim.

    `name`: the notebook's, as "03_ablations". Raises ValueError for a name without a
    number, for no claims, and for two of the same claim, comparison and metric.
    """
    if not re.match(r"\d\d_", name):
        raise ValueError(
            f"The claims of {name!r} would not be collected: expected a notebook's name, such as '03_ablations'."
        )
    rows = [
        (*claim[:4], claim.difference.count, *claim.difference[:3], claim.verdict)
        for claim in claims
    ]
    table = pd.DataFrame(rows, columns=list(_COLUMNS))
    if table.empty:
        raise ValueError(f"{name!r} has no claims to save.")
    repeated = table[table.duplicated(["claim", "compared", "metric"])]
    if len(repeated):
        raise ValueError(
            f"{name!r} judges the same twice: {', '.join(repeated['compared'] + ' by ' + repeated['metric'])}."
        )
    _write(Path(folder) / f"{name}_claims.csv", table.to_csv(index=False, lineterminator="\n"))
    return table


def collect_claims(folder: Path | str) -> pd.DataFrame:
    """All claims of `folder`, in order of claim, then notebook, written to
    `folder`/claims.csv; without any, an empty table and no file.

    Raises DataError for a file that `save_claims` did not write.
    """
    tables = [_read(path) for path in sorted(Path(folder).glob("[0-9][0-9]_*claims.csv"))]
    if not tables:
        return pd.DataFrame(columns=list(_COLUMNS))
    table = pd.concat(tables, ignore_index=True).sort_values(
        "claim", kind="stable", ignore_index=True
    )
    _write(Path(folder) / "claims.csv", table.to_csv(index=False, lineterminator="\n"))
    return table


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str)[list(_COLUMNS)].astype(
            _COLUMNS
        )  # read as text, for numbers exact to the last digit
    except (
        KeyError,
        ValueError,
    ) as error:  # of a missing column, and of what is no number or no CSV
        raise DataError(
            f"{path} is no table of claims ({error}). Expected the columns {', '.join(_COLUMNS)}; run its notebook."
        ) from error


def write_readme_section(readme: Path | str, table: pd.DataFrame) -> bool:
    """Write the table between the two marker lines of `readme`; equal tables give equal
    bytes. False without such lines or such a file.
    """
    readme = Path(readme)
    text = readme.read_bytes().decode() if readme.is_file() else ""
    if not _SECTION.search(text):
        return False
    lines = []
    for claim, rows in table.groupby("claim", sort=False):
        verdicts = ", ".join(
            f"{count} {judged}"
            for judged, count in rows["verdict"].value_counts().sort_index(ascending=False).items()
        )
        lines += [
            f"**{claim}.** Comparisons: {len(rows)}; {verdicts}.",
            "",
            "<details><summary>The comparisons</summary>",
            "",
            *_HEADER,
        ]
        lines += [*(_judged(row) for row in rows.itertuples()), "", "</details>", ""]
    _write(readme, _SECTION.sub(lambda _: "\n" + "\n".join(lines) + "\n", text, count=1))
    return True


def _judged(row) -> str:
    unit, spec = (" dB", "+.2f") if row.metric == "psnr" else ("", "+.3f")
    difference = Interval(row.mean, row.low, row.high, row.batches)
    return _line(
        row.compared,
        row.metric,
        f"{row.images} / {row.batches}",
        format(difference, spec) + unit,
        row.verdict,
    )


def _line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_bytes(text.encode())
    os.replace(draft, path)

"""What the paper published, to set beside what is measured here: `data/published.json`."""

import json
from typing import Any

import pandas as pd

from gipip.errors import DataError
from gipip.files import DATA


def published(chart: str) -> pd.DataFrame:
    """The paper's SSIM over "batch size", "noise" (σ), "sparsity" or "epochs" (of
    training of the global model): a row for each bar.

    Columns: the chart's name, `anomaly score` ("without", "with") and `ssim`. The bars
    were measured from the charts of Sun et al., GI-PIP, ICASSP 2024: ImageNet 64×64.
    Where B is not the axis it is not stated: the bars at 0 are those of B = 1, the
    released commands say 4. Raises DataError for any other chart.
    """
    charts = _published()["charts"]
    if chart not in charts:
        raise DataError(f"The paper has no chart over {chart!r}. Known: {', '.join(charts)}.")
    table = pd.DataFrame(charts[chart]).rename(columns={"values": chart})
    return table.melt(chart, ["without", "with"], var_name="anomaly score", value_name="ssim")


def published_psnr() -> float:
    """The paper's headline in dB: GI-PIP's mean PSNR on ImageNet with auxiliary data
    worth 3.8 % of it.
    """
    return _published()["psnr"]["value"]


def _published() -> dict[str, Any]:
    return json.loads((DATA / "published.json").read_text(encoding="utf-8"))

"""Writes what the benchmarks measured into the README and draws
figures/benchmark_quality: python benchmarks/report.py
"""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn
from reports import RESULTS, read_rows

from gipip.figures import LABELS, PAGE, save_figure, use_style

ROOT = Path(__file__).parent.parent
SECTION = re.compile(
    r"(?<=^<!-- benchmarks: written by benchmarks/report.py -->\n).*?(?=^<!-- end of benchmarks -->$)",
    re.DOTALL | re.MULTILINE,
)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def iterations() -> list[str]:
    frame = pd.DataFrame(read_rows("iteration"))
    rows = []
    for (machine, model, size, attack), part in frame.groupby(
        ["machine", "model", "batch size", "attack"], sort=False
    ):
        cells = part.set_index("engine")
        found = [
            f"{row['passes']:.2f} [{row['passes low']:.2f}, {row['passes high']:.2f}]"
            for _, row in cells.iterrows()
        ]
        by_engine = dict(zip(cells.index, found, strict=True))
        about = [machine, model, str(size), f"{part['pass ms'].median():.0f} ms", attack]
        rows.append(
            [
                *about,
                *(
                    by_engine.get(engine, "")
                    for engine in ("eager", "traced", "compiled", "cudagraph")
                ),
                part["date"].max(),
            ]
        )
    text = (
        "**An iteration** in forward and backward passes of the client, timed in turn (medians and quartiles; the arithmetic needs 2.33 "
        "where all gradients are formed):"
    )
    return [
        text,
        "",
        *table(
            [
                "machine",
                "network",
                "B",
                "a pass",
                "attack",
                "eager",
                "traced",
                "compiled",
                "cudagraph",
                "date",
            ],
            rows,
        ),
    ]


def memory() -> list[str]:
    rows = [
        [
            row["machine"],
            f"{row['model']}, B = {row['batch size']}, {row['image size']}×{row['image size']}",
            row["engine"],
        ]
        + [
            str(row["chunk size"]),
            f"{row['peak GiB']:.1f} GiB",
            f"{row['seconds an iteration']:.0f} s",
            row["date"],
        ]
        for row in read_rows("memory")
    ]
    text = "**Memory** of an attack at its peak, beyond that of the process before, for the gradient taken from so many images at a time:"
    return [
        text,
        "",
        *table(["machine", "attack", "engine", "at a time", "peak", "an iteration", "date"], rows),
    ]


def together() -> list[str]:
    rows = [
        [row["machine"], row["model"], str(row["batch size"]), str(row["attacks"])]
        + [
            f"{row['speed-up']:.2f} [{row['speed-up low']:.2f}, {row['speed-up high']:.2f}]",
            row["date"],
        ]
        for row in read_rows("together")
    ]
    text = "**Several attacks at once** in one process (`attack.many`), against one after another; median and range of the repetitions:"
    return [text, "", *table(["machine", "network", "B", "attacks", "times as fast", "date"], rows)]


def scale_out() -> list[str]:
    path = RESULTS / "scale_out.json"
    if not path.exists():
        return []
    measured = json.loads(path.read_text())
    low, middle, high = (measured["efficiency"][name] for name in ("minimum", "median", "maximum"))
    return [
        f"**Two workers** on two cores do {middle:.0%} [{low:.0%}, {high:.0%}] of twice one worker's work (median and range of "
        f"{len(measured['repetitions'])} repetitions; {measured['machine']}, {measured['date']}).",
        "",
    ]


def quality() -> list[str]:
    """Draws the course of PSNR over time, and gives a table of where each attack ends."""
    frame = pd.DataFrame(read_rows("quality"))
    use_style()
    figure, axes = plt.subplots(figsize=(PAGE, 3.2), layout="constrained")
    mean = frame.groupby(["arm", "iteration"], sort=False)[["seconds", "psnr"]].mean().reset_index()
    for color, (arm, part) in zip(
        seaborn.color_palette(), mean.groupby("arm", sort=False), strict=False
    ):
        marker = "o" if arm.endswith("gipip") else ""
        axes.plot(
            part["seconds"], part["psnr"], color=color, marker=marker, markersize=4, label=arm
        )
    images = frame["seed"].nunique()
    axes.set(xlabel="seconds on one CPU thread", ylabel=LABELS["psnr"], xscale="log")
    axes.set_title(
        f"mean of {images} private images, B = 1, untrained {frame['model'].iloc[0]}; points: whole attacks",
        fontsize=7,
    )
    axes.legend(fontsize=7)
    save_figure("benchmark_quality", figure, mean, ROOT / "figures")
    last = (
        mean.loc[mean.groupby("arm", sort=False)["iteration"].idxmax()] if not mean.empty else mean
    )
    released = last[last["arm"].str.endswith("as released")]
    ours = mean[mean["arm"].str.endswith("gipip")]
    ends = pd.concat([released, ours]).itertuples()
    rows = [
        [row.arm, f"{row.iteration:,}", f"{row.seconds:.1f} s", f"{row.psnr:.2f} dB"]
        for row in ends
    ]
    text = (
        f"**Quality in time**: single CIFAR-10 images, untrained {frame['model'].iloc[0]}, mean of {images} private images, one thread "
        f"({frame['machine'].iloc[0]}, {frame['date'].max()}). The released attacks run with the public implementations' double backward."
    )
    picture = "![PSNR against seconds](figures/benchmark_quality.png)"
    return [text, "", picture, "", *table(["attack", "iterations", "time", "PSNR"], rows)]


def main() -> None:
    readme = ROOT / "README.md"
    lines = ["", *iterations(), *quality(), *together(), *memory(), *scale_out()]
    readme.write_text(SECTION.sub(lambda _: "\n".join(lines), readme.read_text(), count=1))


if __name__ == "__main__":
    main()

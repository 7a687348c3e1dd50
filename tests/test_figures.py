"""Figures: the files they become and the numbers they draw."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from gipip import figures
from gipip.evaluation.published import published
from gipip.evaluation.statistics import Interval, bootstrap_interval
from gipip.files import DATA


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        figures.use_style()
        yield
    plt.close("all")


def measurements():
    generator = np.random.default_rng(0)
    rows = [
        {"batch_size": size, "arm": arm, "batch": batch, "psnr": 20 - size + generator.normal()}
        for size in (8, 1)
        for arm in ("Inverting Gradients", "GI-PIP")
        for batch in range(4)
        for _ in range(size)
    ]
    return pd.DataFrame(rows)


def scores():
    """Arms and batch sizes in another order than the published ones, and a batch size
    that was not published.
    """
    frame = measurements().rename(columns={"arm": "anomaly score", "psnr": "ssim"})
    names = {"Inverting Gradients": "with", "GI-PIP": "without"}
    return frame.assign(
        **{"batch size": frame["batch_size"].replace(8, 3), "ssim": frame["ssim"] / 40}
    ).replace({"anomaly score": names})


def defences():
    columns = [
        "defence",
        "strength",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "ssim",
        "ssim_low",
        "ssim_high",
    ]
    rows = [
        ("none", "none", 60.0, np.nan, np.nan, 0.6, 0.55, 0.7),
        ("noise", "σ = 0.01", 58.0, 57.0, 59.0, 0.4, 0.35, 0.5),
        ("noise", "σ = 0.1", 40.0, 38.0, 42.0, 0.1, 0.05, 0.2),
        ("pruning", "90 %", 57.5, 57.0, 58.5, 0.45, 0.4, 0.5),
    ]
    return pd.DataFrame(rows, columns=columns)


def error_bars(axes):
    """The ends of all error bars that are seen: (bars, 2 ends, 2 coordinates)."""
    ends = np.concatenate(
        [np.array(bars.get_segments()).reshape(-1, 2, 2) for bars in axes.collections]
    )
    return ends[np.isfinite(ends).all((1, 2))]


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def line_figure():
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1])
    return figure, pd.DataFrame({"x": [0, 1], "y": [0.0, 1 / 3]})


def test_save_figure_writes_picture_vector_and_numbers(tmp_path):
    figure, numbers = line_figure()
    files = figures.save_figure("lines", figure, numbers, folder=tmp_path / "new")
    assert files.png.read_bytes().startswith(b"\x89PNG") and files.pdf.read_bytes().startswith(
        b"%PDF"
    )
    assert files.csv.read_text() == "x,y\n0,0\n1,0.333333\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "lines.csv",
        "lines.pdf",
        "lines.png",
    ]


def test_save_figure_gives_the_same_bytes_again(tmp_path):
    first, second = (
        figures.save_figure("lines", *line_figure(), folder=tmp_path / name) for name in "ab"
    )
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_save_figure_takes_the_current_figure_and_the_numbers_attached_to_it(tmp_path):
    figures.paired_effect({"batch size 4": Interval(0.5, 0.25, 0.75, 8)}, "PSNR gain (dB)")
    files = figures.save_figure("effect", folder=tmp_path)
    assert files.csv.read_text() == "effect,mean,low,high,count\nbatch size 4,0.5,0.25,0.75,8\n"


def test_save_figure_without_numbers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no numbers"):
        figures.save_figure("lines", line_figure()[0], folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_save_figure_names_the_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="'lines' cannot be written to .*file.*Pass a folder"):
        figures.save_figure("lines", *line_figure(), folder=tmp_path / "file")


def test_a_figure_that_fails_to_save_leaves_the_old_files(tmp_path, monkeypatch):
    before = figures.save_figure("lines", *line_figure(), folder=tmp_path).png.read_bytes()
    monkeypatch.setattr(
        pd.DataFrame, "to_csv", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        figures.save_figure("lines", *line_figure(), folder=tmp_path, dpi=50)
    assert (tmp_path / "lines.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 3


def test_image_grid_shows_every_pixel_of_every_image():
    rows = {"private": torch.rand(3, 3, 8, 8), "GI-PIP": torch.rand(3, 3, 8, 8)}
    figure = figures.image_grid(
        rows, captions={"GI-PIP": ["18.9 dB", "19.0 dB", "20.1 dB"]}, titles=["cat", "dog", "ship"]
    )
    shown = [axes.images[0] for axes in figure.axes]
    expected = torch.cat(list(rows.values())).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(np.stack([image.get_array() for image in shown]), expected)
    assert {image.get_interpolation() for image in shown} == {"nearest"}
    assert [axes.get_ylabel() for axes in figure.axes] == ["private", "", "", "GI-PIP", "", ""]
    assert [axes.get_xlabel() for axes in figure.axes[3:]] == ["18.9 dB", "19.0 dB", "20.1 dB"]


def test_image_grid_keeps_square_images_square_and_within_its_width():
    figure = figures.image_grid({"private": torch.rand(16, 3, 8, 8)}, width=5.0)
    boxes = [axes.get_position() for axes in figure.axes]
    width, height = figure.get_size_inches()
    assert width <= 5 + 1e-9
    assert {round(box.width * width / (box.height * height), 6) for box in boxes} == {1.0}
    assert min(box.y0 for box in boxes) >= 0 and max(box.y1 for box in boxes) <= 1


def test_image_grid_refuses_rows_of_different_length():
    with pytest.raises(ValueError, match=r"\[2, 3\] images"):
        figures.image_grid({"a": torch.rand(2, 3, 8, 8), "b": torch.rand(3, 3, 8, 8)})


def test_cost_curves_draw_each_term_in_a_panel():
    histories = {
        "GI-PIP": {"gradient": torch.tensor([1.0, 0.5]), "tv": torch.tensor([0.2, 0.1])},
        "DLG": {"gradient": torch.tensor([2.0])},
    }
    figure = figures.cost_curves(histories)
    assert [axes.get_title() for axes in figure.axes] == ["gradient", "tv"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert figure.data_drawn["iteration"].tolist() == [0, 1, 0, 1, 0]
    assert figure.data_drawn["value"].tolist() == pytest.approx([1, 0.5, 0.2, 0.1, 2])


def test_cost_curves_accept_a_single_cost():
    assert figures.cost_curves({"DLG": torch.tensor([1.0, 0.1])}).data_drawn["term"].unique() == [
        "cost"
    ]


@pytest.mark.filterwarnings("error")
def test_cost_curves_draw_a_term_of_weight_0_on_a_linear_axis():
    figure = figures.cost_curves({"GI-PIP": {"gradient": torch.ones(3), "anomaly": torch.zeros(3)}})
    figure.canvas.draw()
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]


def test_interval_bars_draw_group_aware_intervals_in_the_order_of_the_table():
    frame = measurements()
    figure = figures.interval_bars(frame, "batch_size", "psnr", "arm")
    numbers = figure.data_drawn
    part = frame[(frame["batch_size"] == 8) & (frame["arm"] == "GI-PIP")]
    expected = bootstrap_interval(part["psnr"], groups=part["batch"])
    drawn = numbers[(numbers["batch_size"] == 8) & (numbers["arm"] == "GI-PIP")].iloc[0]
    assert drawn[["mean", "low", "high", "count"]].tolist() == pytest.approx(list(expected))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["8", "1"]
    assert heights(figure.axes[0]) == pytest.approx(
        numbers.sort_values("arm", ascending=False)["mean"].tolist()
    )


def test_interval_bars_say_what_their_error_bars_are():
    axes = figures.interval_bars(measurements(), "batch_size", "psnr", "arm").axes[0]
    assert (
        "95 % bootstrap interval" in axes.get_title()
        and "4 independent batches" in axes.get_title()
    )
    assert axes.get_ylabel() == "PSNR (dB), higher is better"


def test_interval_bars_of_single_observations_have_no_error_bar():
    frame = pd.DataFrame({"x": [1, 2], "arm": ["a", "a"], "ssim": [0.5, 0.6]})
    figure = figures.interval_bars(frame, "x", "ssim", "arm", groups=None)
    assert figure.data_drawn["low"].isna().all() and not len(error_bars(figure.axes[0]))
    assert figure.axes[0].get_title() == "bars: mean\none image each, no intervals"


def test_an_interval_that_is_a_point_is_drawn_as_one():
    frame = pd.DataFrame({"x": 1, "arm": "a", "batch": range(7), "ssim": 0.1})
    for draw in (figures.interval_bars, figures.interval_lines):
        assert error_bars(draw(frame, "x", "ssim", "arm").axes[0])[0, :, 1] == pytest.approx(
            [0.1, 0.1]
        )


@pytest.mark.parametrize("xscale", ["category", "linear", "log", "symlog"])
def test_interval_lines_draw_group_aware_intervals(xscale):
    frame = measurements()
    figure = figures.interval_lines(frame, "batch_size", "psnr", "arm", xscale=xscale)
    axes, numbers = figure.axes[0], figure.data_drawn
    for line, arm in zip(axes.containers, ("Inverting Gradients", "GI-PIP"), strict=True):
        order = [8, 1] if xscale == "category" else [1, 8]
        parts = [frame[(frame["batch_size"] == size) & (frame["arm"] == arm)] for size in order]
        assert line[0].get_xdata().tolist() == ([0, 1] if xscale == "category" else order)
        assert line[0].get_ydata() == pytest.approx([np.mean(part["psnr"]) for part in parts])
        intervals = [bootstrap_interval(part["psnr"], groups=part["batch"]) for part in parts]
        assert np.stack(line[2][0].get_segments())[:, :, 1] == pytest.approx(
            np.array([[each.low, each.high] for each in intervals])
        )
        drawn = (
            numbers[numbers["arm"] == arm]
            .set_index("batch_size")
            .loc[order, ["mean", "low", "high", "count"]]
        )
        assert drawn.to_numpy() == pytest.approx(np.array(intervals))


def test_interval_lines_stand_three_points_apart_on_every_scale():
    for xscale in ("linear", "log"):
        figure = figures.interval_lines(measurements(), "batch_size", "psnr", "arm", xscale=xscale)
        figure.canvas.draw()
        first, second = (
            line[0].get_transform().transform(line[0].get_xydata())[:, 0]
            for line in figure.axes[0].containers
        )
        assert second - first == pytest.approx(3 / 72 * figure.dpi)


def test_interval_lines_label_the_values_of_categories_and_logarithmic_axes():
    frame = measurements().assign(noise=lambda frame: frame["batch_size"].map({8: 0.01, 1: 0.0}))
    for xscale, labels in {"category": ["0.01", "0"], "symlog": ["0.01", "0"]}.items():
        axes = figures.interval_lines(
            frame, "noise", "psnr", "arm", xscale=xscale, xlabel="σ"
        ).axes[0]
        assert [
            label.get_text() for label in axes.get_xticklabels()
        ] == labels and axes.get_xlabel() == "σ"


def test_interval_lines_draw_zero_alone_on_a_symmetric_logarithmic_axis():
    axes = figures.interval_lines(
        measurements().assign(noise=0.0), "noise", "psnr", "arm", xscale="symlog"
    ).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0"]


def test_interval_lines_refuse_zero_on_a_logarithmic_axis():
    frame = measurements().assign(noise=0.0)
    with pytest.raises(ValueError, match=r"cannot show the value 0.0: pass xscale='symlog'"):
        figures.interval_lines(frame, "noise", "psnr", "arm", xscale="log")


def test_interval_lines_say_what_their_error_bars_are():
    axes = figures.interval_lines(measurements(), "batch_size", "psnr", "arm").axes[0]
    assert (
        "95 % bootstrap interval" in axes.get_title()
        and "4 independent batches" in axes.get_title()
    )
    assert axes.get_ylabel() == "PSNR (dB), higher is better"


def test_published_bars_set_the_published_values_beside_the_means_here():
    frame, titles = scores(), ("published: A", "here: B")
    figure = figures.published_bars(
        frame, published("batch size"), "batch size", "ssim", "anomaly score", titles=titles
    )
    left, right = figure.axes
    assert heights(left) == pytest.approx(
        [0.48, 0.40, 0.27, 0.22, 0.18, 0.16, 0.53, 0.46, 0.42, 0.38, 0.33, 0.29]
    )
    means = frame.groupby(["anomaly score", "batch size"])["ssim"].mean()
    assert heights(right) == pytest.approx(
        [means[arm, size] for arm in ("without", "with") for size in (3, 1)]
    )
    assert left.get_title().startswith("published: A\n") and right.get_title().startswith(
        "here: B\n"
    )
    assert len(error_bars(left)) == 0 and len(error_bars(right)) == 4
    drawn = figure.data_drawn.groupby("panel", sort=False)["mean"].apply(list)
    assert drawn["published: A"] == pytest.approx(heights(left))
    assert sorted(drawn["here: B"]) == pytest.approx(sorted(heights(right)))


def test_published_bars_have_one_order_one_scale_and_one_palette_for_both_panels():
    figure = figures.published_bars(
        scores(), published("batch size"), "batch size", "ssim", "anomaly score"
    )
    left, right = figure.axes
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            "1",
            "2",
            "3",
            "4",
            "8",
            "12",
            "16",
        ]
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert right.patches[0].get_x() == pytest.approx(
        2 - 0.4
    )  # batch size 3 without the anomaly score: the third place
    assert [axes.containers[1].get_label() for axes in figure.axes] == ["without", "without"]
    assert (
        left.patches[0].get_facecolor()
        == right.patches[0].get_facecolor()
        != left.patches[-1].get_facecolor()
    )


def test_tradeoff_draws_a_point_and_its_intervals_for_each_row():
    frame = defences()
    figure = figures.tradeoff(
        frame, "accuracy", "ssim", "strength", "defence", xlabel="accuracy (%)"
    )
    axes = figure.axes[0]
    points = np.concatenate([container[0].get_xydata() for container in axes.containers])
    assert points == pytest.approx(frame[["accuracy", "ssim"]].to_numpy())
    across = [
        (row.accuracy_low, row.ssim, row.accuracy_high, row.ssim) for row in frame[1:].itertuples()
    ]  # "none" has no interval
    upright = [
        (row.accuracy, row.ssim_low, row.accuracy, row.ssim_high) for row in frame.itertuples()
    ]
    assert np.array(sorted(error_bars(axes).reshape(-1, 4).tolist())) == pytest.approx(
        np.array(sorted(across + upright))
    )
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("accuracy (%)", "SSIM, higher is better")
    assert "95 % bootstrap interval" in axes.get_title()
    pd.testing.assert_frame_equal(figure.data_drawn, frame, check_like=True)


def test_tradeoff_labels_every_point_and_covers_none():
    frame = defences()
    figure = figures.tradeoff(frame, "accuracy", "ssim", "strength", "defence")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["none", "σ = 0.01", "σ = 0.1", "90 %"]
    boxes = [text.get_window_extent() for text in axes.texts]
    pixels = axes.transData.transform(frame[["accuracy", "ssim"]].to_numpy())
    assert not any(box.contains(*pixel) for box in boxes for pixel in pixels)
    assert not any(
        box.overlaps(other) for index, box in enumerate(boxes) for other in boxes[:index]
    )
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_tradeoff_without_intervals_has_no_error_bars_and_claims_none():
    figure = figures.tradeoff(
        defences()[["defence", "strength", "accuracy", "ssim"]],
        "accuracy",
        "ssim",
        "strength",
        "defence",
    )
    assert not figure.axes[0].collections and figure.axes[0].get_title() == ""


def test_tradeoff_refuses_missing_values():
    with pytest.raises(ValueError, match=r"\['accuracy'\] have missing"):
        figures.tradeoff(
            defences().assign(accuracy=np.nan), "accuracy", "ssim", "strength", "defence"
        )


@pytest.mark.parametrize(("best", "corner"), [("highest", (1, 0)), ("lowest", (0, 1))])
def test_heatmap_shows_means_and_outlines_the_best(best, corner):
    frame = pd.DataFrame(
        {"tv": [0.1, 0.1, 0.1, 0.3, 0.3], "as": [1.0, 1, 3, 1, 3], "psnr": [10.0, 12, 14, 9, 13]}
    )
    figure = figures.heatmap(
        frame,
        "tv",
        "as",
        "psnr",
        label="PSNR (dB)",
        rows_label="λ_TV",
        columns_label="λ_AS",
        best=best,
        decimals=1,
    )
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.texts] == ["11.0", "14.0", "9.0", "13.0"]
    assert axes.patches[0].get_xy() == corner
    assert [label.get_text() for label in axes.get_xticklabels() + axes.get_yticklabels()] == [
        "1",
        "3",
        "0.1",
        "0.3",
    ]
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("λ_AS", "λ_TV", "PSNR (dB)")
    assert best in axes.get_title()
    assert figure.data_drawn.to_numpy().tolist() == [
        [0.1, 1, 11, 2],
        [0.1, 3, 14, 1],
        [0.3, 1, 9, 1],
        [0.3, 3, 13, 1],
    ]


def test_heatmap_leaves_a_pair_without_rows_blank_and_refuses_missing_values():
    frame = pd.DataFrame({"tv": [0.1, 0.3, 0.3], "as": [1.0, 1, 3], "psnr": [10.0, 12, 14]})
    figure = figures.heatmap(frame, "tv", "as", "psnr", label="PSNR (dB)")
    assert [text.get_text() for text in figure.axes[0].texts] == ["10.00", "12.00", "14.00"]
    with pytest.raises(ValueError, match=r"\['psnr'\] have missing"):
        figures.heatmap(frame.assign(psnr=[1, np.inf, 2]), "tv", "as", "psnr", label="PSNR (dB)")


@pytest.mark.parametrize("width", [figures.COLUMN, figures.PAGE])
def test_no_label_is_cut_off_and_no_legend_covers_data(width):
    frame = measurements()
    drawn = [
        figures.interval_bars(frame, "batch_size", "psnr", "arm", width=width),
        figures.interval_lines(frame, "batch_size", "psnr", "arm", width=width, xscale="log"),
        figures.tradeoff(defences(), "accuracy", "ssim", "strength", "defence", width=width),
        figures.heatmap(frame, "arm", "batch_size", "psnr", label="PSNR (dB)", width=width),
    ]
    if width == figures.PAGE:
        drawn.append(
            figures.published_bars(
                scores(), published("batch size"), "batch size", "ssim", "anomaly score"
            )
        )
    for figure in drawn:
        figure.canvas.draw()
        ink, (across, up) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(ink.x0, ink.y0) >= 0 and ink.x1 <= across and ink.y1 <= up
        legends = [legend.get_window_extent() for legend in figure.legends]
        assert not any(legend.overlaps(axes.bbox) for legend in legends for axes in figure.axes)


def test_published_charts_are_the_papers():
    batch = published("batch size").pivot(
        index="batch size", columns="anomaly score", values="ssim"
    )
    assert batch.loc[8].to_dict() == {"without": 0.22, "with": 0.38} and batch.index.tolist() == [
        1,
        2,
        4,
        8,
        12,
        16,
    ]
    ends = {
        "batch size": (16, 0.16, 0.29),
        "noise": (0.1, 0.11, 0.20),
        "sparsity": (0.99, 0.19, 0.31),
        "epochs": (100, 0.27, 0.35),
    }
    for chart, end in ends.items():
        table = published(chart).pivot(index=chart, columns="anomaly score", values="ssim")
        assert table.iloc[0].to_dict() == {"without": 0.48, "with": 0.53}
        assert (table.index[-1], *table.iloc[-1][["without", "with"]]) == end
        assert (table["with"] > table["without"]).all() and table["with"].is_monotonic_decreasing


def test_published_file_says_where_its_numbers_are_from():
    file = json.loads((DATA / "published.json").read_text(encoding="utf-8"))
    assert "ICASSP 2024" in file["source"] and "measured from the charts" in file["source"]
    assert file["psnr"] == {
        "value": 16.12,
        "unit": "dB",
        "setting": "ImageNet",
        "auxiliary share": 0.038,
    }


def test_an_unknown_published_chart_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="no chart over 'momentum'. Known: batch size, noise, sparsity, epochs"
    ):
        published("momentum")


def test_paired_effect_shows_intervals_around_a_line_at_no_difference():
    figure = figures.paired_effect(
        {"B=1": Interval(0.4, 0.1, 0.7, 8), "B=4": Interval(-0.1, -0.3, 0.1, 8)}, "PSNR gain (dB)"
    )
    axes = figure.axes[0]
    assert axes.lines[0].get_xdata() == [0, 0]
    assert [text.get_text() for text in axes.texts] == [
        "+0.40 [+0.10, +0.70]  n=8",
        "−0.10 [−0.30, +0.10]  n=8",
    ]
    assert axes.get_xlabel() == "PSNR gain (dB)\nmean and 95 % bootstrap interval"

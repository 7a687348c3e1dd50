"""Figures: the files they become and the numbers they draw."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.container import BarContainer

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
    ends = [segment for part in axes.collections for segment in part.get_segments()]
    seen = [each for each in ends if len(each) == 2 and np.isfinite(each).all()]
    return np.array(seen).reshape(-1, 2, 2)


def bars(axes):
    """The bars of each arm that has a name."""
    return [part for part in axes.containers if isinstance(part, BarContainer)]


def heights(axes):
    """Those of all bars, without the gaps."""
    return [bar.get_height() for part in bars(axes) for bar in part if bar.get_height()]


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


def test_a_figure_that_fails_to_save_leaves_the_old_files(tmp_path):
    class Unwritable(pd.DataFrame):
        def to_csv(self, *_, **__):
            raise OSError("disk full")

    figure, numbers = line_figure()
    before = figures.save_figure("lines", figure, numbers, folder=tmp_path).png.read_bytes()
    figure.axes[0].set_title("another")
    with pytest.raises(OSError, match="disk full"):
        figures.save_figure("lines", figure, Unwritable(numbers), folder=tmp_path)
    assert (tmp_path / "lines.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 3


def test_saved_files_show_as_one_short_line(tmp_path):
    files = figures.save_figure("lines", *line_figure(), folder=tmp_path)
    assert repr(files) == f"{tmp_path / 'lines.png'}, .pdf and .csv"


def test_no_label_of_a_figure_drawn_by_hand_is_cut_off(tmp_path):
    figure, numbers = line_figure()
    figure.axes[0].set_ylabel("three\nlines of\ntext")
    picture = plt.imread(figures.save_figure("lines", figure, numbers, folder=tmp_path).png)
    edges = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
    assert all((edge == 1).all() for edge in edges)


def test_image_grid_shows_every_pixel_of_every_image_beside_its_names():
    rows = {"private": torch.rand(3, 3, 8, 8), "GI-PIP": torch.rand(3, 3, 8, 8)}
    captions, titles = {"GI-PIP": ["18.9 dB", "19.0 dB", "20.1 dB"]}, ["cat", "dog", "ship"]
    figure = figures.image_grid(rows, captions, titles)
    for axes, (row, images) in zip(figure.axes, rows.items(), strict=True):
        (shown,) = axes.images
        assert shown.get_interpolation() == "nearest"
        assert [label.get_text() for label in axes.get_yticklabels()] == [row]
        for column, image in zip(axes.get_xticks(), images, strict=True):
            part = shown.get_array()[2:10, int(column - 3.5) : int(column + 4.5)]
            np.testing.assert_array_equal(part, image.permute(1, 2, 0).numpy())
    assert [text.get_text() for text in figure.axes[0].texts] == titles
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == captions["GI-PIP"]
    assert figure.data_drawn["caption"].tolist() == ["", "", ""] + captions["GI-PIP"]


def test_image_grid_clamps_and_shows_one_image():
    figure = figures.image_grid({"private": torch.full((1, 3, 8, 8), 2.0)})
    assert (figure.axes[0].images[0].get_array() == 1).all()
    assert figure.axes[0].get_xticks().tolist() == [3.5]


def test_image_grid_keeps_square_images_square_and_within_its_width():
    names = ["private", "a name that is\nlonger than others"]
    figure = figures.image_grid({name: torch.rand(16, 3, 8, 8) for name in names}, width=5.0)
    figure.canvas.draw()
    width, height = figure.get_size_inches()
    assert width <= 5 + 1e-9
    for axes in figure.axes:
        box, pixels = axes.get_window_extent(), axes.images[0].get_array().shape
        assert box.width / box.height == pytest.approx(pixels[1] / pixels[0])
    ink = figure.get_tightbbox()
    assert min(ink.x0, ink.y0) >= 0 and ink.x1 <= width and ink.y1 <= height


@pytest.mark.filterwarnings("error")
def test_image_grid_raises_no_warning_where_a_session_has_the_style(tmp_path):
    figures.image_grid({"private": torch.rand(2, 3, 8, 8)})
    figures.save_figure("grid", folder=tmp_path)


@pytest.mark.parametrize(("first", "second"), [(2, 3), (0, 0)])
def test_image_grid_refuses_rows_of_different_length_and_empty_ones(first, second):
    with pytest.raises(ValueError, match=rf"\[{first}, {second}\] images"):
        figures.image_grid({"a": torch.rand(first, 3, 8, 8), "b": torch.rand(second, 3, 8, 8)})


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


def test_cost_curves_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no costs to draw"):
        figures.cost_curves({})


@pytest.mark.filterwarnings("error")
def test_cost_curves_draw_a_term_of_weight_0_on_a_linear_axis():
    figure = figures.cost_curves({"GI-PIP": {"gradient": torch.ones(3), "anomaly": torch.zeros(3)}})
    figure.canvas.draw()
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]


def test_interval_bars_draw_group_aware_intervals_in_the_order_of_the_table():
    frame = measurements()
    figure = figures.interval_bars(frame, "batch_size", "psnr", "arm")
    numbers, axes = figure.data_drawn, figure.axes[0]
    part = frame[(frame["batch_size"] == 8) & (frame["arm"] == "GI-PIP")]
    expected = bootstrap_interval(part["psnr"], groups=part["batch"])
    drawn = numbers[(numbers["batch_size"] == 8) & (numbers["arm"] == "GI-PIP")].iloc[0]
    assert drawn[["mean", "low", "high", "count"]].tolist() == pytest.approx(list(expected))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "1"]
    ordered = numbers.sort_values("arm", ascending=False)
    assert heights(axes) == pytest.approx(ordered["mean"].tolist())
    ends = ordered[["low", "high"]].to_numpy()
    assert error_bars(axes)[:, :, 1] == pytest.approx(ends)


@pytest.mark.parametrize("draw", [figures.interval_bars, figures.interval_lines])
def test_intervals_are_said_to_be_what_they_are(draw):
    axes = draw(measurements(), "batch_size", "psnr", "arm").axes[0]
    assert axes.get_title() == "mean and 95 % bootstrap interval\n4 independent batches each"
    assert axes.get_ylabel() == "PSNR (dB), higher is better"
    assert axes.get_xlabel() == "batch_size"


@pytest.mark.parametrize("draw", [figures.interval_bars, figures.interval_lines])
def test_single_observations_have_no_error_bar(draw):
    frame = pd.DataFrame({"x": [1, 2], "arm": ["a", "a"], "batch": [0, 0], "ssim": [0.5, 0.6]})
    figure = draw(frame, "x", "ssim", "arm")
    assert figure.data_drawn["low"].isna().all() and not len(error_bars(figure.axes[0]))
    assert figure.axes[0].get_title() == "mean\none batch each, no intervals"


@pytest.mark.parametrize("draw", [figures.interval_bars, figures.interval_lines])
def test_an_interval_that_is_a_point_is_drawn_as_one(draw):
    frame = pd.DataFrame({"x": 1, "arm": "a", "batch": range(7), "ssim": 0.1})
    (ends,) = error_bars(draw(frame, "x", "ssim", "arm").axes[0])
    assert ends[:, 1] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("draw", [figures.interval_bars, figures.interval_lines])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda frame: frame.assign(psnr=np.nan), r"\['psnr'\] have missing or infinite"),
        (lambda frame: frame.assign(psnr=np.inf), r"\['psnr'\] have missing or infinite"),
        (lambda frame: frame.assign(arm=None), r"\['arm'\] have missing or infinite"),
        (lambda frame: frame.drop(columns="batch"), "cannot be drawn from 72 rows with"),
        (lambda frame: frame[:0], "cannot be drawn from 0 rows"),
    ],
)
def test_what_a_figure_would_leave_out_is_refused(draw, spoil, message):
    with pytest.raises(ValueError, match=message):
        draw(spoil(measurements()), "batch_size", "psnr", "arm")


@pytest.mark.parametrize("xscale", ["category", "log"])
def test_interval_lines_draw_group_aware_intervals(xscale):
    frame = measurements()
    figure = figures.interval_lines(frame, "batch_size", "psnr", "arm", xscale=xscale)
    axes = figure.axes[0]
    for line, arm in zip(axes.containers, ("Inverting Gradients", "GI-PIP"), strict=True):
        parts = [frame[(frame["batch_size"] == size) & (frame["arm"] == arm)] for size in (1, 8)]
        intervals = [bootstrap_interval(part["psnr"], groups=part["batch"]) for part in parts]
        places = ["1", "8"] if xscale == "category" else [1, 8]
        assert line[0].get_xdata(orig=True).tolist() == places
        assert line[0].get_ydata() == pytest.approx([part["psnr"].mean() for part in parts])
        ends = np.stack(line[2][0].get_segments())[:, :, 1]
        assert ends == pytest.approx(np.array([each[1:3] for each in intervals]))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "8"]


@pytest.mark.parametrize("xscale", ["category", "log"])
def test_interval_lines_stand_three_points_apart_on_every_scale(xscale):
    figure = figures.interval_lines(measurements(), "batch_size", "psnr", "arm", xscale=xscale)
    figure.canvas.draw()
    first, second = (
        line[0].get_transform().transform(line[0].get_xydata())[:, 0]
        for line in figure.axes[0].containers
    )
    assert second - first == pytest.approx(3 / 72 * figure.dpi)


@pytest.mark.parametrize("noise", [{8: 0.01, 1: 0.0}, {8: 0.0, 1: 0.0}])
def test_a_logarithmic_axis_has_a_place_for_0(noise):
    frame = measurements().assign(noise=lambda frame: frame["batch_size"].map(noise))
    figure = figures.interval_lines(frame, "noise", "psnr", "arm", xscale="log")
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == [f"{value:g}" for value in sorted({*noise.values()})]
    places = figure.axes[0].transData.transform([(value, 0) for value in sorted({*noise.values()})])
    assert np.isfinite(places).all() and (np.diff(places[:, 0]) > 50).all()


TITLES = ("published: A", "here: B")


def published_chart():
    chart = "batch size"
    columns = (chart, "ssim", "anomaly score")
    return figures.published_bars(scores(), published(chart), *columns, titles=TITLES)


def test_published_bars_set_the_published_values_beside_the_means_here():
    figure = published_chart()
    left, right = figure.axes
    expected = [0.48, 0.40, 0.27, 0.22, 0.18, 0.16, 0.53, 0.46, 0.42, 0.38, 0.33, 0.29]
    assert heights(left) == pytest.approx(expected)
    means = scores().groupby(["anomaly score", "batch size"])["ssim"].mean()
    here = [means[arm, size] for arm in ("without", "with") for size in (1, 3)]
    assert heights(right) == pytest.approx(here)
    titles = [axes.get_title().split("\n")[0] for axes in figure.axes]
    assert titles == list(TITLES) and "read from the published chart" in left.get_title()
    assert len(error_bars(left)) == 0 and len(error_bars(right)) == 4
    drawn = figure.data_drawn.groupby("panel", sort=False)["mean"].apply(list)
    assert drawn[TITLES[0]] == pytest.approx(heights(left))
    assert sorted(drawn[TITLES[1]]) == pytest.approx(sorted(heights(right)))


def test_published_bars_have_one_order_one_scale_and_one_palette_for_both_panels():
    left, right = published_chart().axes
    for axes in (left, right):
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["1", "2", "3", "4", "8", "12", "16"]
        assert [part.get_label() for part in bars(axes)] == ["without", "with"]
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    third = bars(right)[0][2]  # batch size 3 without the anomaly score
    assert third.get_x() == pytest.approx(2 - 0.4)
    colors = [[part[0].get_facecolor() for part in bars(axes)] for axes in (left, right)]
    assert colors[0] == colors[1] and len(set(colors[0])) == 2


def test_tradeoff_draws_a_point_and_its_intervals_for_each_row():
    frame = defences()
    figure = figures.tradeoff(frame, "accuracy", "ssim", "strength", "defence")
    axes = figure.axes[0]
    points = np.concatenate([container[0].get_xydata() for container in axes.containers])
    assert points == pytest.approx(frame[["accuracy", "ssim"]].to_numpy())
    rows = list(frame.itertuples())
    across = [(row.accuracy_low, row.ssim, row.accuracy_high, row.ssim) for row in rows[1:]]
    upright = [(row.accuracy, row.ssim_low, row.accuracy, row.ssim_high) for row in rows]
    drawn = sorted(error_bars(axes).reshape(-1, 4).tolist())
    assert np.array(drawn) == pytest.approx(np.array(sorted(across + upright)))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("accuracy", "SSIM, higher is better")
    assert "95 % bootstrap interval" in axes.get_title()
    pd.testing.assert_frame_equal(figure.data_drawn, frame, check_like=True)


def test_tradeoff_numbers_every_point_and_names_it_in_the_legend():
    frame = defences()
    figure = figures.tradeoff(frame, "accuracy", "ssim", "strength", "defence")
    numbers = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert list(numbers) == ["1", "2", "3", "4"]
    assert list(numbers.values()) == list(zip(frame["accuracy"], frame["ssim"], strict=True))
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == ["1  none", "2  σ = 0.01", "3  σ = 0.1", "4  90 %"]
    colors = [container[0].get_color() for container in figure.axes[0].containers]
    assert colors[1] == colors[2] and len(set(colors)) == 3


def test_tradeoff_without_intervals_has_no_error_bars_and_claims_none():
    frame = defences()[["defence", "strength", "accuracy", "ssim"]]
    figure = figures.tradeoff(frame, "accuracy", "ssim", "strength", "defence")
    assert not len(error_bars(figure.axes[0])) and figure.axes[0].get_title() == ""


def test_tradeoff_refuses_missing_values():
    frame = defences().assign(accuracy=np.nan)
    with pytest.raises(ValueError, match=r"\['accuracy'\] have missing"):
        figures.tradeoff(frame, "accuracy", "ssim", "strength", "defence")


def test_heatmap_shows_means_and_outlines_the_highest():
    frame = pd.DataFrame(
        {"tv": [0.1, 0.1, 0.1, 0.3, 0.3], "as": [1.0, 1, 3, 1, 3], "psnr": [10.0, 12, 14, 9, 13]}
    )
    figure = figures.heatmap(frame, "tv", "as", "psnr", label="PSNR (dB)")
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.texts] == ["11.00", "14.00", "9.00", "13.00"]
    assert axes.patches[0].get_xy() == (1, 0) and "the highest" in axes.get_title()
    ticks = axes.get_xticklabels() + axes.get_yticklabels()
    assert [label.get_text() for label in ticks] == ["1", "3", "0.1", "0.3"]
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("as", "tv", "PSNR (dB)")
    expected = [[0.1, 1, 11, 2], [0.1, 3, 14, 1], [0.3, 1, 9, 1], [0.3, 3, 13, 1]]
    assert figure.data_drawn.to_numpy().tolist() == expected


def test_heatmap_leaves_a_pair_without_rows_blank_and_refuses_missing_values():
    frame = pd.DataFrame({"tv": [0.1, 0.3, 0.3], "as": [1.0, 1, 3], "psnr": [10.0, 12, 14]})
    figure = figures.heatmap(frame, "tv", "as", "psnr", label="PSNR (dB)")
    assert [text.get_text() for text in figure.axes[0].texts] == ["10.00", "12.00", "14.00"]
    with pytest.raises(ValueError, match=r"\['psnr'\] have missing"):
        figures.heatmap(frame.assign(psnr=[1, np.inf, 2]), "tv", "as", "psnr", label="PSNR (dB)")


def test_no_label_is_cut_off_and_no_legend_covers_data():
    frame = measurements()
    drawn = [
        figures.interval_bars(frame, "batch_size", "psnr", "arm"),
        figures.interval_lines(frame, "batch_size", "psnr", "arm", figures.PAGE, "log"),
        figures.tradeoff(defences(), "accuracy", "ssim", "strength", "defence"),
        figures.heatmap(frame, "arm", "batch_size", "psnr", label="PSNR (dB)"),
        figures.cost_curves({"DLG": {"gradient": torch.ones(3), "tv": torch.zeros(3)}}),
        published_chart(),
    ]
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


@pytest.mark.parametrize("effects", [{}, {"B=1": Interval(float("nan"), 0.1, 0.7, 8)}])
def test_paired_effects_that_cannot_be_drawn_are_refused(effects):
    with pytest.raises(ValueError, match="missing or infinite|cannot be drawn from 0 rows"):
        figures.paired_effect(effects, "PSNR gain (dB)")

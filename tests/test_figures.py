"""Figures: the files they become and the numbers they draw."""

import itertools
import json
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text

from gipip import figures
from gipip.errors import DataError
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


def beside_published():
    """The paper's chart and measurements, in another order and at a batch size that was
    not published.
    """
    measured = measurements().rename(columns={"batch_size": "batch size"})
    measured = measured.assign(ssim=measured["psnr"] / 40, **{"batch size": 3})
    measured["anomaly score"] = measured["arm"].map({"GI-PIP": "with"}).fillna("without")
    return pd.concat(
        {"published": published("batch size"), "here": measured}, names=["setting"]
    ).reset_index("setting")


def published_chart(**options):
    columns = ("batch size", "ssim", "anomaly score")
    return figures.interval_dots(
        beside_published(), *columns, panel="setting", width=7.2, **options
    )


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


def dots(axes):
    """The dots of each arm, by its name."""
    named = zip(*axes.get_legend_handles_labels(), strict=True)
    return {label: line for line, label in named if len(line.get_xdata())}


def places(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def reference_lines(axes):
    return [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]


def on_paper(line):
    """Where the dots of a line are, in points."""
    pixels = line.get_transform().transform(line.get_xydata())
    return pixels * 72 / line.figure.dpi


def line_figure():
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1])
    return figure, pd.DataFrame({"x": [0, 1], "y": [0.0, 1 / 3]})


def test_save_figure_writes_picture_vector_and_numbers(tmp_path):
    figure, numbers = line_figure()
    path = figures.save_figure("lines", figure, numbers, folder=tmp_path / "new")
    assert path == tmp_path / "new" / "lines.png" and path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert path.with_suffix(".csv").read_text() == "x,y\n0,0\n1,0.333333\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "lines.csv",
        "lines.pdf",
        "lines.png",
    ]


def assert_equal_bytes(first, second):
    names = sorted(path.name for path in first.iterdir())
    assert len(names) == 3
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_save_figure_gives_the_same_bytes_again(tmp_path):
    for name in "ab":
        figures.save_figure("lines", *line_figure(), folder=tmp_path / name)
    assert_equal_bytes(tmp_path / "a", tmp_path / "b")


def test_save_figure_takes_the_current_figure_and_the_numbers_attached_to_it(tmp_path):
    figures.paired_effect({"batch size 4": Interval(0.5, 0.25, 0.75, 8)}, "PSNR gain (dB)")
    path = figures.save_figure("effect", folder=tmp_path)
    assert (
        path.with_suffix(".csv").read_text()
        == "effect,mean,low,high,count\nbatch size 4,0.5,0.25,0.75,8\n"
    )


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
    before = figures.save_figure("lines", figure, numbers, folder=tmp_path).read_bytes()
    figure.axes[0].set_title("another")
    with pytest.raises(OSError, match="disk full"):
        figures.save_figure("lines", figure, Unwritable(numbers), folder=tmp_path)
    assert (tmp_path / "lines.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 3


def test_no_label_of_a_figure_drawn_by_hand_is_cut_off(tmp_path):
    figure, numbers = line_figure()
    figure.axes[0].set_ylabel("three\nlines of\ntext")
    picture = plt.imread(figures.save_figure("lines", figure, numbers, folder=tmp_path))
    edges = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
    assert all((edge == 1).all() for edge in edges)


def test_image_grid_shows_every_pixel_of_every_image_beside_its_names():
    rows = {"private": torch.rand(3, 3, 8, 8), "GI-PIP": torch.rand(3, 3, 8, 8)}
    captions, titles = {"GI-PIP": ["18.9 dB", "19.0 dB", "20.1 dB"]}, ["cat", "dog", "ship"]
    figure = figures.image_grid(rows, captions, titles)
    grid = np.array(figure.axes).reshape(2, 3)
    for line, (row, images) in zip(grid, rows.items(), strict=True):
        assert [axes.get_ylabel() for axes in line] == [row, "", ""]
        assert [axes.get_xlabel() for axes in line] == captions.get(row, ["", "", ""])
        for axes, image in zip(line, images, strict=True):
            (shown,) = axes.images
            assert shown.get_interpolation() == "nearest"
            np.testing.assert_array_equal(shown.get_array(), image.permute(1, 2, 0).numpy())
    assert [axes.get_title() for axes in grid.flat] == [*titles, "", "", ""]
    assert figure.data_drawn["GI-PIP"].tolist() == captions["GI-PIP"]


def test_image_grid_clamps():
    figure = figures.image_grid({"private": torch.full((1, 3, 8, 8), 2.0)})
    assert (figure.axes[0].images[0].get_array() == 1).all()


def test_image_grid_keeps_square_images_square_and_within_its_width():
    names = ["private", "a name that is\nlonger than others"]
    figure = figures.image_grid({name: torch.rand(8, 3, 8, 8) for name in names}, width=5.0)
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


@pytest.mark.parametrize("lengths", [[2, 3], [0, 0], [9, 9], []])
def test_image_grid_refuses_rows_of_different_length_and_more_than_eight_images(lengths):
    rows = {str(row): torch.rand(count, 3, 8, 8) for row, count in enumerate(lengths)}
    with pytest.raises(ValueError, match=rf"{re.escape(str(lengths))} images.*one to eight"):
        figures.image_grid(rows)


def test_cost_curves_draw_each_term_in_a_panel():
    histories = {
        "GI-PIP": {"gradient": torch.tensor([1.0, 0.5]), "tv": torch.tensor([0.2, 0.1])},
        "DLG": {"gradient": torch.tensor([2.0])},
    }
    figure = figures.cost_curves(histories)
    assert [axes.get_title() for axes in figure.axes] == ["gradient", "tv"]
    drawn = [[line for line in axes.lines if len(line.get_xdata())] for axes in figure.axes]
    assert [len(lines) for lines in drawn] == [2, 1]
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


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("xscale", ["category", "log"])
def test_dots_are_means_with_bootstrap_intervals_over_batches(joined, xscale):
    frame, options = measurements(), {"joined": joined, "xscale": xscale}
    figure = figures.interval_dots(frame, "batch_size", "psnr", "arm", **options)
    axes, drawn = figure.axes[0], figure.data_drawn.set_index(["batch_size", "arm"])
    assert list(dots(axes)) == ["Inverting Gradients", "GI-PIP"] and places(axes) == ["1", "8"]
    ends = []
    for arm, line in dots(axes).items():
        for size, mean in zip((1, 8), line.get_ydata(), strict=True):
            part = frame[(frame["batch_size"] == size) & (frame["arm"] == arm)]
            expected = bootstrap_interval(part["psnr"], groups=part["batch"])
            assert drawn.loc[size, arm].tolist() == pytest.approx([*expected, len(part)])
            assert mean == pytest.approx(expected.mean)
            ends.append(expected[1:3])
    assert error_bars(axes)[:, :, 1] == pytest.approx(np.array(ends))


def test_numbers_ascend_and_texts_keep_their_order():
    frame = measurements()
    texts = frame.assign(batch_size="B = " + frame["batch_size"].astype(str))
    for table, expected in [(frame, ["1", "8"]), (texts, ["B = 8", "B = 1"])]:
        figure = figures.interval_dots(table, "batch_size", "psnr", "arm")
        assert places(figure.axes[0]) == expected


def test_long_names_of_places_are_broken_between_words():
    frame = pd.DataFrame({"x": ["labels given"] * 2 + ["labels inferred"] * 2 + ["c", "d", "e"]})
    frame = frame.assign(arm="a", batch=range(7), ssim=0.1)
    figure = figures.interval_dots(frame, "x", "ssim", "arm")
    assert places(figure.axes[0])[:2] == ["labels\ngiven", "labels\ninferred"]


def test_the_caption_says_what_is_drawn_of_how_many_images_and_batches():
    axes = figures.interval_dots(measurements(), "batch_size", "psnr", "arm").axes[0]
    interval = "mean and 95 % bootstrap interval"
    assert axes.get_title() == f"{interval}\nn = 4–32 images in 4 independent batches"
    assert axes.get_ylabel() == "PSNR (dB), higher is better"
    assert axes.get_xlabel() == "batch size"


def test_single_batches_have_no_interval():
    frame = pd.DataFrame({"x": [1, 2], "arm": ["a", "a"], "batch": [0, 0], "ssim": [0.5, 0.6]})
    figure = figures.interval_dots(frame, "x", "ssim", "arm")
    assert figure.data_drawn["low"].isna().all() and not len(error_bars(figure.axes[0]))
    title = figure.axes[0].get_title()
    assert title == "mean, no intervals\nn = 1 image in 1 independent batch"


def test_an_interval_that_is_a_point_is_drawn_as_one():
    frame = pd.DataFrame({"x": 1, "arm": "a", "batch": range(7), "ssim": 0.1})
    (ends,) = error_bars(figures.interval_dots(frame, "x", "ssim", "arm").axes[0])
    assert ends[:, 1] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda frame: frame.assign(psnr=np.nan), r"missing or infinite values in \['psnr'\]"),
        (lambda frame: frame.assign(psnr=np.inf), r"missing or infinite values in \['psnr'\]"),
        (lambda frame: frame.assign(arm=None), r"missing or infinite values in \['arm'\]"),
        (lambda frame: frame.drop(columns="batch"), r"from 72 rows, .* \['batch'\]"),
        (lambda frame: frame[:0], "cannot be drawn from 0 rows"),
    ],
)
def test_what_a_figure_would_leave_out_is_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        figures.interval_dots(spoil(measurements()), "batch_size", "psnr", "arm")


@pytest.mark.parametrize("options", [{}, {"joined": True}, {"joined": True, "xscale": "log"}])
def test_arms_stand_side_by_side_and_look_different(options):
    figure = figures.interval_dots(measurements(), "batch_size", "psnr", "arm", **options)
    figure.canvas.draw()
    first, second = dots(figure.axes[0]).values()
    apart = on_paper(second)[:, 0] - on_paper(first)[:, 0]
    assert apart == pytest.approx(3 if options else 9)
    assert first.get_color() != second.get_color() and first.get_marker() != second.get_marker()
    assert (first.get_linestyle() == "-") == bool(options)


@pytest.mark.parametrize("noise", [{8: 0.01, 1: 0.0}, {8: 0.0, 1: 0.0}])
def test_a_logarithmic_axis_has_a_place_for_0(noise):
    frame = measurements().assign(noise=lambda frame: frame["batch_size"].map(noise))
    figure = figures.interval_dots(frame, "noise", "psnr", "arm", xscale="log")
    figure.canvas.draw()
    values = sorted({*noise.values()})
    assert places(figure.axes[0]) == [f"{value:g}" for value in values]
    at = figure.axes[0].transData.transform([(value, 0) for value in values])
    assert np.isfinite(at).all() and (np.diff(at[:, 0]) > 50).all()


def test_published_values_stand_beside_measured_ones_without_intervals():
    figure = published_chart()
    left, right = figure.axes
    assert dots(left)["without"].get_ydata().tolist() == [0.48, 0.40, 0.27, 0.22, 0.18, 0.16]
    assert dots(left)["with"].get_ydata().tolist() == [0.53, 0.46, 0.42, 0.38, 0.33, 0.29]
    assert len(error_bars(left)) == 0 and len(error_bars(right)) == 2
    assert left.get_title() == "published\nas published, no intervals"
    assert right.get_title().startswith("here\nmean and 95 % bootstrap interval\nn = 36 images")
    drawn = figure.data_drawn.set_index("setting")
    assert drawn.loc["published", ["low", "high"]].isna().all(axis=None)
    assert drawn.loc["here", ["low", "high"]].notna().all(axis=None)


def test_panels_have_only_their_places_and_share_order_scale_and_looks():
    left, right = published_chart().axes
    assert places(left) == ["1", "2", "4", "8", "12", "16"] and places(right) == ["3"]
    assert left.get_ylim() == right.get_ylim() and left.get_ylabel() and not right.get_ylabel()
    for arm in ("without", "with"):
        assert dots(left)[arm].get_color() == dots(right)[arm].get_color()
        assert dots(left)[arm].get_marker() == dots(right)[arm].get_marker()


def test_an_arm_that_only_a_later_panel_has_is_in_the_legend():
    frame = measurements().assign(setting="here")
    frame.loc[frame["arm"] == "GI-PIP", "setting"] = "there"
    figure = figures.interval_dots(frame, "batch_size", "psnr", "arm", panel="setting")
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == ["Inverting Gradients", "GI-PIP"]


REFERENCES = {"mean image": 5.0, "4×4 thumbnail": 30.1, "mean colour": 30.0}


def test_references_are_lines_and_rows_of_the_drawn_data():
    columns = ("batch_size", "psnr", "arm")
    figure = figures.interval_dots(measurements(), *columns, references=REFERENCES)
    axes = figure.axes[0]
    assert sorted(reference_lines(axes)) == sorted(REFERENCES.values())
    drawn = figure.data_drawn.set_index("arm")["mean"]
    assert drawn[[*REFERENCES]].to_dict() == REFERENCES and len(drawn) == 4 + 3
    low, high = axes.get_ylim()
    assert low < 5 and high > 30.1


def test_the_names_of_references_stand_outside_in_order_and_apart():
    columns = ("batch_size", "psnr", "arm")
    figure = figures.interval_dots(measurements(), *columns, references=REFERENCES)
    figure.canvas.draw()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in figure.axes[0].texts}
    assert all(box.x0 > figure.axes[0].bbox.x1 for box in boxes.values())
    ordered = [boxes[name] for name in ("mean image", "mean colour", "4×4 thumbnail")]
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(ordered))


def test_references_hold_for_measured_panels_only():
    left, right = published_chart(references={"mean colour": 0.1}).axes
    assert reference_lines(left) == [] and reference_lines(right) == [0.1]


def test_equal_dots_give_equal_bytes(tmp_path):
    for name in "ab":
        figures.save_figure("dots", published_chart(references=REFERENCES), folder=tmp_path / name)
    assert_equal_bytes(tmp_path / "a", tmp_path / "b")


def test_tradeoff_draws_a_point_and_its_intervals_for_each_row():
    frame = defences().assign(images=32, count=8)
    figure = figures.tradeoff(frame, "accuracy", "ssim", "strength", "defence")
    axes = figure.axes[0]
    points = np.concatenate([line.get_xydata() for line in dots(axes).values()])
    assert points == pytest.approx(frame[["accuracy", "ssim"]].to_numpy())
    rows = list(frame.itertuples())
    across = [(row.accuracy_low, row.ssim, row.accuracy_high, row.ssim) for row in rows[1:]]
    upright = [(row.accuracy, row.ssim_low, row.accuracy, row.ssim_high) for row in rows]
    drawn = sorted(error_bars(axes).reshape(-1, 4).tolist())
    assert np.array(drawn) == pytest.approx(np.array(sorted(across + upright)))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("accuracy", "SSIM, higher is better")
    interval = "mean and 95 % bootstrap interval"
    assert axes.get_title() == f"{interval}\nn = 32 images in 8 independent batches"
    pd.testing.assert_frame_equal(figure.data_drawn, frame, check_like=True)


def test_tradeoff_numbers_every_point_and_names_it_in_the_legend():
    frame = defences()
    figure = figures.tradeoff(frame, "accuracy", "ssim", "strength", "defence")
    numbers = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert list(numbers) == ["1", "2", "3", "4"]
    assert list(numbers.values()) == list(zip(frame["accuracy"], frame["ssim"], strict=True))
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == ["1  none", "2  σ = 0.01", "3  σ = 0.1", "4  90 %"]
    colors = [line.get_color() for line in dots(figure.axes[0]).values()]
    assert colors[1] == colors[2] and len(set(colors)) == 3


def test_tradeoff_without_intervals_has_no_error_bars_and_claims_none():
    frame = defences()[["defence", "strength", "accuracy", "ssim"]]
    figure = figures.tradeoff(frame, "accuracy", "ssim", "strength", "defence")
    assert not len(error_bars(figure.axes[0])) and figure.axes[0].get_title() == ""


def test_tradeoff_refuses_missing_values():
    frame = defences().assign(accuracy=np.nan)
    with pytest.raises(ValueError, match=r"missing or infinite values in \['accuracy'\]"):
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
    with pytest.raises(ValueError, match=r"missing or infinite values in \['psnr'\]"):
        figures.heatmap(frame.assign(psnr=[1, np.inf, 2]), "tv", "as", "psnr", label="PSNR (dB)")


def test_no_label_is_cut_off_and_no_legend_covers_data():
    frame = measurements()
    drawn = [
        figures.interval_dots(frame, "batch_size", "psnr", "arm"),
        figures.interval_dots(frame, "batch_size", "psnr", "arm", references=REFERENCES),
        figures.interval_dots(frame, "batch_size", "psnr", "arm", joined=True, xscale="log"),
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
        DataError, match="no chart over 'momentum'. Known: batch size, noise, sparsity, epochs"
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
    assert axes.get_xlabel() == (
        "PSNR gain (dB)\nmean and 95 % bootstrap interval, n: independent batches"
    )


@pytest.mark.parametrize("effects", [{}, {"B=1": Interval(float("nan"), 0.1, 0.7, 8)}])
def test_paired_effects_that_cannot_be_drawn_are_refused(effects):
    with pytest.raises(ValueError, match="missing or infinite|cannot be drawn from 0 rows"):
        figures.paired_effect(effects, "PSNR gain (dB)")

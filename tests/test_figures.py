"""Figures: the files they become and the numbers they draw."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from gipip import figures
from gipip.metrics import Interval, bootstrap_interval


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


def line_figure():
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1])
    return figure, pd.DataFrame({"x": [0, 1], "y": [0.0, 1 / 3]})


def test_save_figure_writes_picture_vector_and_numbers(tmp_path):
    figure, numbers = line_figure()
    files = figures.save_figure("lines", figure, numbers, folder=tmp_path / "new")
    assert files.png.read_bytes().startswith(b"\x89PNG") and files.pdf.read_bytes().startswith(b"%PDF")
    assert files.csv.read_text() == "x,y\n0,0\n1,0.333333\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["lines.csv", "lines.pdf", "lines.png"]


def test_save_figure_gives_the_same_bytes_again(tmp_path):
    first, second = (figures.save_figure("lines", *line_figure(), folder=tmp_path / name) for name in "ab")
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
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        figures.save_figure("lines", *line_figure(), folder=tmp_path, dpi=50)
    assert (tmp_path / "lines.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 3


def test_image_grid_shows_every_pixel_of_every_image():
    rows = {"private": torch.rand(3, 3, 8, 8), "GI-PIP": torch.rand(3, 3, 8, 8)}
    figure = figures.image_grid(rows, captions={"GI-PIP": ["18.9 dB", "19.0 dB", "20.1 dB"]}, titles=["cat", "dog", "ship"])
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
    histories = {"GI-PIP": {"gradient": torch.tensor([1.0, 0.5]), "tv": torch.tensor([0.2, 0.1])}, "DLG": {"gradient": torch.tensor([2.0])}}
    figure = figures.cost_curves(histories)
    assert [axes.get_title() for axes in figure.axes] == ["gradient", "tv"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert figure.data_drawn["iteration"].tolist() == [0, 1, 0, 1, 0]
    assert figure.data_drawn["value"].tolist() == pytest.approx([1, 0.5, 0.2, 0.1, 2])


def test_cost_curves_accept_a_single_cost():
    assert figures.cost_curves({"DLG": torch.tensor([1.0, 0.1])}).data_drawn["term"].unique() == ["cost"]


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
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx(numbers.sort_values("arm", ascending=False)["mean"].tolist())


def test_interval_bars_say_what_their_error_bars_are():
    axes = figures.interval_bars(measurements(), "batch_size", "psnr", "arm").axes[0]
    assert "95 % bootstrap interval" in axes.get_title() and "4 independent batches" in axes.get_title()
    assert axes.get_ylabel() == "PSNR (dB), higher is better"


def test_interval_bars_of_single_observations_have_no_error_bar():
    frame = pd.DataFrame({"x": [1, 2], "arm": ["a", "a"], "ssim": [0.5, 0.6]})
    assert figures.interval_bars(frame, "x", "ssim", "arm", groups=None).data_drawn["low"].isna().all()


def test_paired_effect_shows_intervals_around_a_line_at_no_difference():
    figure = figures.paired_effect({"B=1": Interval(0.4, 0.1, 0.7, 8), "B=4": Interval(-0.1, -0.3, 0.1, 8)}, "PSNR gain (dB)")
    axes = figure.axes[0]
    assert axes.lines[0].get_xdata() == [0, 0]
    assert [text.get_text() for text in axes.texts] == ["+0.40 [+0.10, +0.70]  n=8", "-0.10 [-0.30, +0.10]  n=8"]
    assert axes.get_xlabel() == "PSNR gain (dB)\nmean and 95 % bootstrap interval"

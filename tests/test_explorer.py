"""The explorer's panel, without a browser: what its widgets hold before, during and
after an attack.
"""

import io
import time

import pytest
import torch
from PIL import Image

from gipip import explorer as module
from gipip.attacks.dlg import DLG
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.data.datasets import load_dataset
from gipip.explorer import Explorer, explore, picture
from gipip.priors.autoencoder import load_prior


@pytest.fixture
def explorer():
    panel = Explorer(load_dataset("cifar10"), load_prior())
    panel.iterations.value = 6
    yield panel
    panel.stop()
    if panel.thread:
        panel.thread.join(60)


def finish(explorer):
    explorer.start()
    explorer.thread.join(60)
    assert not explorer.thread.is_alive()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def size(png):
    return Image.open(io.BytesIO(png)).size


def test_when_nobody_watches_no_panel_is_built_and_one_stable_line_says_so(monkeypatch, capsys):
    monkeypatch.setenv("GIPIP_HEADLESS", "1")
    monkeypatch.setattr(module, "Explorer", None)
    assert explore(load_dataset("cifar10"), load_prior()) is None
    assert (
        capsys.readouterr().out
        == "The explorer is a live panel: it is built only when a person has the notebook open.\n"
    )


def test_a_person_who_watches_gets_the_panel(monkeypatch):
    monkeypatch.setenv("GIPIP_HEADLESS", "0")
    assert isinstance(explore(load_dataset("cifar10"), load_prior()), module.ipywidgets.VBox)


def test_the_truth_is_shown_and_follows_batch_and_batch_size(explorer):
    seen = [explorer.truth.value]
    explorer.seed.value = 1
    seen.append(explorer.truth.value)
    explorer.batch_size.value = 4
    seen.append(explorer.truth.value)
    assert len(set(seen)) == 3
    assert explorer.truth.value == picture(explorer.data.private(batch_size=4, seed=1).images)


@pytest.mark.parametrize(
    ("attack", "kind"),
    [("GIPIP", GIPIP), ("Inverting Gradients", InvertingGradients), ("DLG", DLG)],
)
def test_every_attack_runs_and_ends_with_its_picture_and_quality(explorer, attack, kind):
    explorer.model.value, explorer.attack.label = "lenet", attack
    blank = explorer.reconstruction.value
    finish(explorer)
    assert isinstance(explorer.chosen_attack(), kind)
    assert explorer.reconstruction.value != blank and size(explorer.reconstruction.value) == size(
        explorer.truth.value
    )
    assert "PSNR" in explorer.message.value and "SSIM" in explorer.message.value
    assert explorer.bar.value == 6 and explorer.status.value.startswith("6 of 6 iterations, cost")


def test_the_pictures_arrive_while_the_attack_runs(explorer, monkeypatch):
    monkeypatch.setattr(module, "_REFRESH", 0)
    pictures = []
    explorer.reconstruction.observe(lambda change: pictures.append(change["new"]), "value")
    finish(explorer)
    assert len(set(pictures)) >= 6


def test_the_attack_gets_the_weights_of_the_sliders(explorer):
    explorer.tv_weight.value, explorer.as_weight.value = 1e-2, 1.0
    assert (explorer.chosen_attack().tv_weight, explorer.chosen_attack().as_weight) == (1e-2, 1.0)


def test_weights_that_the_attack_does_not_have_are_disabled(explorer):
    states = {}
    for attack in ("DLG", "Inverting Gradients", "GIPIP"):
        explorer.attack.label = attack
        states[attack] = (explorer.tv_weight.disabled, explorer.as_weight.disabled)
    assert states == {
        "DLG": (True, True),
        "Inverting Gradients": (False, True),
        "GIPIP": (False, False),
    }


def test_start_and_stop_are_enabled_in_turn_and_the_controls_wait(explorer):
    explorer.iterations.value = 10_000
    assert (explorer.start_button.disabled, explorer.stop_button.disabled) == (False, True)
    explorer.start_button.click()
    assert (
        explorer.start_button.disabled,
        explorer.stop_button.disabled,
        explorer.seed.disabled,
    ) == (True, False, True)
    explorer.stop_button.click()
    explorer.thread.join(60)
    assert (
        explorer.start_button.disabled,
        explorer.stop_button.disabled,
        explorer.seed.disabled,
    ) == (False, True, False)


def test_a_stopped_attack_shows_what_it_reached(explorer):
    explorer.iterations.value = 10_000
    explorer.start()
    wait_for(lambda: explorer.bar.value > 0)
    explorer.stop()
    explorer.thread.join(60)
    assert (
        "PSNR" in explorer.message.value and "stopped by the user after" in explorer.message.value
    )
    assert 0 < explorer.bar.value < 10_000 and explorer.bar.bar_style == "warning"


def test_a_second_start_while_one_runs_does_nothing(explorer):
    explorer.iterations.value = 10_000
    explorer.start()
    first = explorer.thread
    explorer.start()
    assert explorer.thread is first


def test_a_new_start_clears_what_the_last_run_left(explorer, monkeypatch):
    blank = explorer.reconstruction.value
    finish(explorer)
    monkeypatch.setattr(Explorer, "_invert", lambda self: None)
    finish(explorer)
    assert (explorer.reconstruction.value, explorer.status.value, explorer.bar.value) == (
        blank,
        "",
        0,
    )


def test_after_a_run_another_can_be_started(explorer):
    finish(explorer)
    explorer.seed.value = 2
    assert explorer.message.value == ""
    finish(explorer)
    assert "PSNR" in explorer.message.value


def test_an_error_is_shown_in_the_panel_and_the_controls_come_back(explorer, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no <memory> left")

    monkeypatch.setattr(module, "build_model", fail)
    finish(explorer)
    assert "RuntimeError: no &lt;memory&gt; left" in explorer.message.value
    assert (
        explorer.bar.bar_style == "danger"
        and not explorer.start_button.disabled
        and explorer.stop_button.disabled
    )


def test_the_attack_shows_no_progress_of_its_own(explorer, capsys):
    finish(explorer)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("batch", "expected"), [(1, (256, 256)), (4, (262, 262)), (8, (394, 198))])
def test_a_picture_holds_all_images_in_at_most_two_rows(batch, expected):
    assert size(picture(torch.rand(batch, 3, 32, 32))) == expected


def test_a_picture_keeps_the_pixels_values():
    image = torch.zeros(1, 3, 32, 32)
    image[0, 0, 5, 7] = 1
    png = Image.open(io.BytesIO(picture(image)))
    assert png.getpixel((7 * 8 + 4, 5 * 8 + 4)) == (255, 0, 0) and png.getpixel(
        (8 * 8, 5 * 8 + 4)
    ) == (0, 0, 0)

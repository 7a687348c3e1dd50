"""The explorer's panel, without a browser: what its widgets hold before, during and
after an attack.
"""

import io
import json
import time
from datetime import UTC, datetime

import pytest
import torch
from PIL import Image

from gipip import explorer as module
from gipip.attacks.gipip import GIPIP
from gipip.data.datasets import load_dataset
from gipip.experiments.scenario import Scenario
from gipip.explorer import Explorer, explore, picture
from gipip.federation.client import Client
from gipip.files import DATA
from gipip.priors.autoencoder import load_prior
from gipip.progress import quiet


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
    seen = [explorer.images["private"].value]
    explorer.seed.value = 1
    seen.append(explorer.images["private"].value)
    explorer.batch_size.value = 4
    seen.append(explorer.images["private"].value)
    assert len(set(seen)) == 3
    assert explorer.images["private"].value == picture(
        explorer.data.private(batch_size=4, seed=1).images
    )


@pytest.mark.parametrize("attack", ["GIPIP", "InvertingGradients", "FeatureInversion", "DLG"])
def test_every_attack_runs_and_ends_with_its_picture_curve_and_quality(explorer, attack):
    explorer.model.value, explorer.attack.label = "lenet", attack
    blank = explorer.images["reconstruction"].value, explorer.images["cost"].value
    finish(explorer)
    assert explorer.record["attack"]["name"] == attack
    assert (
        explorer.images["reconstruction"].value != blank[0]
        and explorer.images["cost"].value != blank[1]
    )
    assert size(explorer.images["reconstruction"].value) == size(explorer.images["private"].value)
    assert all(text in explorer.message.value for text in ("PSNR", "SSIM", "LPIPS"))
    assert explorer.bar.value == 6 and "6 iterations in" in explorer.message.value


def test_gias_searches_with_the_generator_that_ships(explorer):
    explorer.model.value, explorer.attack.label = "lenet", "GIAS"
    explorer.start()
    wait_for(lambda: explorer.bar.value > 0)
    explorer.stop()
    explorer.thread.join(60)
    assert explorer.record["attack"]["name"] == "GIAS"


def test_the_pictures_arrive_while_the_attack_runs(explorer, monkeypatch):
    monkeypatch.setattr(module, "_REFRESH", 0)
    pictures = []
    explorer.images["reconstruction"].observe(
        lambda change: pictures.append(change["new"]), "value"
    )
    finish(explorer)
    assert len(set(pictures)) >= 6


def test_the_attack_gets_the_weights_that_are_chosen(explorer):
    explorer.tv_weight.value, explorer.as_weight.value = 1e-2, 1.0
    finish(explorer)
    attack = explorer.record["attack"]
    assert (attack["tv_weight"], attack["as_weight"]) == (1e-2, 1.0)


def test_tuned_weights_follow_model_batch_size_attack_and_defence(explorer):
    seen = []

    def look():
        seen.append((explorer.tv_weight.value, explorer.as_weight.value))
        assert f"weights: tuned for {explorer.scenario.condition}" in explorer.origin.value

    look()
    explorer.batch_size.value = 8
    look()
    explorer.model.value = "resnet18"
    look()
    explorer.batch_size.value, explorer.model.value = 1, "convnet16"
    explorer.defense.label = "noise 0.1"
    look()
    explorer.attack.label = "InvertingGradients"
    look()
    table = json.loads((DATA / "tuned.json").read_text())["settings"]
    noisy = table["cifar10/convnet16/B=1/noise 0.1"]
    expected = [table["cifar10/convnet/B=1"]["GIPIP"], table["cifar10/convnet/B=8"]["GIPIP"]]
    expected += [table["cifar10/resnet18/B=8"]["GIPIP"], noisy["GIPIP at equal TV weight"]]
    expected += [noisy["InvertingGradients"] | {"as_weight": seen[-1][1]}]
    assert seen == [(each["tv_weight"], each["as_weight"]) for each in expected]


def test_where_no_weights_were_tuned_the_attack_has_its_own_and_the_panel_says_so(explorer):
    explorer.batch_size.value = 8
    explorer.model.value = "lenet"
    assert "none were tuned for cifar10/lenet/B=8" in explorer.origin.value
    fields = GIPIP.model_fields
    assert explorer.tv_weight.value == fields["tv_weight"].default
    assert explorer.as_weight.value == fields["as_weight"].default


def test_weights_that_a_user_chose_outlast_another_batch_and_a_run(explorer):
    explorer.tv_weight.value = 0.5
    explorer.seed.value = 3
    finish(explorer)
    assert explorer.tv_weight.value == 0.5


def test_a_defence_changes_what_the_client_shares(explorer):
    explorer.defense.label = "noise 0.1"
    finish(explorer)
    assert explorer.record["assumptions"]["defence"] == "noise 0.1"
    assert explorer.record["scenario"]["defenses"] == [
        {"kind": "gaussian_noise", "std": 0.1, "seed": 0}
    ]


def upload(name, content):
    about = {"name": name, "type": "", "size": len(content), "content": memoryview(content)}
    return about | {"last_modified": datetime.now(UTC)}


def png(width, height, color="red"):
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, format="PNG")
    return file.getvalue()


def test_pictures_of_ones_own_are_attacked_in_place_of_the_data_sets(explorer):
    explorer.pictures.value = [upload("a.png", png(90, 60)), upload("b.png", png(32, 32, "blue"))]
    colours = [
        Image.open(io.BytesIO(explorer.images["private"].value)).getpixel((50, y))
        for y in (50, 200)
    ]
    assert colours == [(255, 0, 0), (0, 0, 255)]
    finish(explorer)
    assert explorer.record["pictures"] == ["a.png", "b.png"]
    assert explorer.record["scenario"]["batch_size"] == 2


def test_a_batch_of_the_data_set_takes_the_place_of_ones_own_pictures(explorer):
    explorer.pictures.value = [upload("a.png", png(32, 32))]
    explorer.seed.value = 1
    assert not explorer.pictures.value
    assert explorer.images["private"].value == picture(explorer.data.private(seed=1).images)


@pytest.mark.parametrize("content", [b"no picture", b"", png(40, 40)[:60]])
def test_an_upload_that_is_no_picture_is_refused_by_its_name(explorer, content):
    before = explorer.images["private"].value
    explorer.pictures.value = [upload("notes.txt", content)]
    assert "notes.txt cannot be read as an image" in explorer.message.value
    assert explorer.images["private"].value == before and not explorer.pictures.value


def test_what_cannot_be_attacked_for_lack_of_auxiliary_images_is_said_in_the_panel():
    explorer = Explorer(load_dataset("imagenet64"), load_prior("imagenet64"))
    explorer.model.value, explorer.attack.label = "lenet", "FeatureInversion"
    finish(explorer)
    assert "auxiliary" in explorer.message.value and explorer.bar.bar_style == "danger"


def test_a_result_is_saved_as_pictures_and_as_json_that_repeats_it(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert explorer.save_button.disabled
    finish(explorer)
    explorer.save_button.click()
    (folder,) = (tmp_path / "results/explorer").iterdir()
    assert str(folder) in explorer.message.value
    for name, shown in explorer.images.items():
        assert (folder / f"{name}.png").read_bytes() == shown.value
    about = json.loads((folder / "result.json").read_text())
    scenario = Scenario(**about["scenario"])
    del about["attack"]["name"]
    attack = GIPIP(**about["attack"] | {"prior": explorer.prior})
    model = scenario.client_model()
    with quiet():
        again = attack(model, scenario.update(model))
    assert picture(again.images) == explorer.images["reconstruction"].value


def test_a_folder_that_cannot_be_written_is_said_in_the_panel(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").write_text("a file")
    finish(explorer)
    explorer.save_button.click()
    assert "Error" in explorer.message.value and "results" in explorer.message.value


def test_nothing_of_an_earlier_result_can_be_saved_once_the_images_change(explorer):
    finish(explorer)
    explorer.seed.value = 1
    assert explorer.save_button.disabled


def test_weights_that_the_attack_does_not_have_are_disabled(explorer):
    states = {}
    for attack in ("DLG", "InvertingGradients", "GIPIP"):
        explorer.attack.label = attack
        states[attack] = (explorer.tv_weight.disabled, explorer.as_weight.disabled)
    assert states == {
        "DLG": (True, True),
        "InvertingGradients": (False, True),
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
    blank = explorer.images["reconstruction"].value
    finish(explorer)
    monkeypatch.setattr(Explorer, "_invert", lambda self: None)
    finish(explorer)
    assert (explorer.images["reconstruction"].value, explorer.message.value) == (blank, "")
    assert explorer.bar.value == 0 and explorer.save_button.disabled


def test_after_a_run_another_can_be_started(explorer):
    finish(explorer)
    explorer.seed.value = 2
    assert explorer.message.value == ""
    finish(explorer)
    assert "PSNR" in explorer.message.value


def test_an_error_is_shown_in_the_panel_and_the_controls_come_back(explorer, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no <memory> left")

    monkeypatch.setattr(Client, "share", fail)
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

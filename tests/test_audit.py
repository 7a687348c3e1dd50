"""An audit: what it computes, keeps, writes and refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import gipip
from gipip.cli import app
from gipip.errors import BatchSizeError, DataError, DefenseError, GipipError, LabelError, ModelError

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def model():
    return gipip.build_model("convnet16")


@pytest.fixture(scope="module")
def batch():
    return gipip.load_dataset("cifar10").tuning(batch_size=4, seed=0)


@pytest.fixture(scope="module")
def auxiliary():
    return gipip.load_dataset("cifar10").auxiliary()[:200]


def finished(*arguments, **options):
    """The same call until nothing is left, however busy the machine is."""
    for _ in range(20):
        try:
            found = gipip.audit(*arguments, **options)
        except GipipError as error:
            assert "The time was over" in str(error)
        else:
            if not found.findings["left"]:
                return found
    raise AssertionError("an audit does not go on where it was")


@pytest.fixture(scope="module")
def found(model, batch, auxiliary, tmp_path_factory):
    """Two batches of two images, without a defence and under one that leaves nothing."""
    return finished(
        model,
        batch,
        defenses=[gipip.GaussianNoise(std=100)],
        batch_size=2,
        auxiliary=auxiliary,
        train=lambda defenses: 0.25 if defenses else 0.75,
        minutes=0.1,
        folder=tmp_path_factory.mktemp("audit"),
    )


def test_features_of_an_undefended_client_are_said_to_be_exact_and_those_under_noise_not(found):
    undefended, defended = found.findings["conditions"]
    assert (undefended["name"], defended["name"]) == ("no defence", "noise 100")
    assert undefended["exact"]["confirmed"] == undefended["exact"]["images"] == 4
    assert defended["exact"]["confirmed"] == 0


def test_the_verdict_tells_an_undefended_client_from_one_that_shares_noise(found):
    risks = [condition["verdict"]["risk"] for condition in found.findings["conditions"]]
    assert risks[0] in ("medium", "high") and risks[1] == "low"


def test_every_attack_is_measured_on_every_image_beside_every_reference(found):
    frame = found.frame
    references = {"mean image", "mean colour", "4×4 thumbnail", "8×8 thumbnail"}
    attacks = {"features, decoded", "features, refined", "GI-PIP", "GI-PIP, smoother"}
    assert {*frame["arm"]} == references | attacks
    assert (frame.groupby(["condition", "arm"]).size() == 4).all()


def test_a_level_needs_ssim_and_one_other_measure_above_the_line(found):
    frame = found.frame.set_index(["batch", "image"])
    line = frame[frame["arm"] == "4×4 thumbnail"]
    for key, row in frame[frame["level"] == "outline"].iterrows():
        own = line.loc[key]
        assert row["ssim"] > own["ssim"]
        assert row["psnr"] > own["psnr"] or row["lpips"] < own["lpips"]


def test_what_is_written_is_the_findings_and_a_page_that_needs_no_other_file(found):
    assert json.loads(found.page.with_name("audit.json").read_text()) == found.findings
    page = found.page.read_text()
    links = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert len(re.findall(r"<img[^>]* alt=\"[^\"]+\"", page)) == page.count("<img")
    assert "75.0 %" in page and "-50.0 points" in page


def test_the_same_call_loads_what_is_finished(found, model, batch, auxiliary):
    def changed():
        return {path: path.stat().st_mtime_ns for path in found.page.parent.glob("attacks/*")}

    before, page = changed(), found.page.read_text()
    again = gipip.audit(
        model,
        batch,
        defenses=[gipip.GaussianNoise(std=100)],
        batch_size=2,
        auxiliary=auxiliary,
        train=lambda defenses: pytest.fail("trained again"),
        minutes=0.1,
        folder=found.page.parent,
    )
    assert changed() == before and again.frame.equals(found.frame)
    assert again.page.read_text() == page


def test_captured_updates_give_pictures_and_no_measure(model, batch, auxiliary, tmp_path):
    update = gipip.Client(model).share(batch[:1], labels="withheld")
    found = finished(model, updates=update, auxiliary=auxiliary, minutes=0.05, folder=tmp_path)
    [condition] = found.findings["conditions"]
    assert condition["verdict"]["risk"] == "unknown"
    assert condition["exact"]["claimed"] == 1 and found.frame.empty
    assert "psnr" not in json.dumps(found.findings)
    assert found.page.read_text().count("<img") == len(condition["attacks"])


def test_a_model_without_a_linear_last_layer_is_attacked_all_the_same(batch, tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 10, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = finished(
        gipip.client_model(network, (0.5,) * 3, (0.25,) * 3),
        batch[:1],
        batch_size=1,
        share_labels=True,
        minutes=0.05,
        folder=tmp_path,
    )
    [condition] = found.findings["conditions"]
    assert "linear layer" in condition["exact"]["no features"]
    assert "linear layer" in condition["obstacles"]["features"]
    assert {attack["name"] for attack in condition["attacks"]} == {"GI-PIP", "GI-PIP, smoother"}


@pytest.mark.parametrize(
    ("images", "labels", "error", "says"),
    [
        (torch.rand(4, 32, 32), torch.zeros(4).long(), DataError, "(batch, channels"),
        (torch.full((4, 3, 32, 32), torch.nan), torch.zeros(4).long(), DataError, "NaN"),
        (torch.rand(4, 3, 32, 32) * 255, torch.zeros(4).long(), DataError, "Divide by 255"),
        (torch.rand(4, 3, 32, 32), torch.full((4,), 10), LabelError, "out of range"),
        (torch.rand(4, 3, 32, 32), torch.zeros(3).long(), DataError, "one for each of 4"),
        (torch.rand(4, 3, 32, 32), None, DataError, "labels"),
        (torch.rand(2, 3, 32, 32), torch.zeros(2).long(), BatchSizeError, "batch of 4"),
        (torch.rand(4, 3, 16, 16), torch.zeros(4).long(), ModelError, "cannot take"),
        (None, None, BatchSizeError, "captured updates"),
    ],
)
def test_unusable_images_are_refused_before_any_attack(
    model, images, labels, error, says, tmp_path, unchecked
):
    with pytest.raises(error, match=re.escape(says)):
        gipip.audit(model, images, labels, folder=tmp_path / "audit")
    assert not (tmp_path / "audit").exists()


def test_other_unusable_input_is_refused_before_any_attack(model, batch, tmp_path, unchecked):
    def refused(error, says, *arguments, **options):
        with pytest.raises(error, match=re.escape(says)):
            gipip.audit(*arguments, folder=tmp_path / "audit", **options)

    refused(ModelError, "client_model", model.network, batch)
    refused(DataError, "minutes", model, batch, minutes=0)
    refused(DefenseError, "twice", model, batch, defenses=[gipip.Clipping(max_norm=1)] * 2)
    refused(DefenseError, "Expected a list", model, batch, defenses=[0.1])
    small = gipip.LabeledImages(torch.rand(4, 3, 16, 16), torch.zeros(4).long())
    refused(DataError, "Scale them", model, batch, auxiliary=small)
    update = gipip.Client(model).share(batch)
    refused(BatchSizeError, "behind the updates", model, batch[:3], updates=update)
    assert not (tmp_path / "audit").exists()


def test_the_examples_of_the_page_run_as_they_stand(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parent.parent / "docs" / "audit.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in code:
        exec(re.sub(r"minutes=[\d.]+", "minutes=0.2", block), names)
    assert "no defence: " in capsys.readouterr().out
    assert Path("results/audit/audit.json").exists() and Path("results/captured").exists()


def test_the_command_audits_pictures_and_says_the_verdict(batch, tmp_path):
    pixels = np.ascontiguousarray(batch.pixels[0].permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    arguments = [tmp_path / "mine.png", "--model", "convnet16", "--batch-size", 1]
    arguments += ["--minutes", 0.3, "--defense", "noise=100", "--output", tmp_path / "audit"]
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "no defence:" in result.stdout and "noise 100:" in result.stdout
    assert (tmp_path / "audit" / "audit.html").exists()


def test_the_command_refuses_an_unknown_defence(tmp_path):
    result = CliRunner().invoke(app, ["audit", "x.png", "--defense", "magic=1"])
    assert result.exit_code == 2 and "no defence" in result.output


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_every_picture_without_horizontal_scrolling(found, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 844})
        problems = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.goto(found.page.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert shown and all(shown) and not problems
        browser.close()

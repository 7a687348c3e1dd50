"""The `gipip` command: what it says, writes and refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image
from typer.testing import CliRunner

import gipip
from gipip.cli import app
from gipip.errors import OutOfTime
from gipip.files import write_tensors
from gipip.priors.gan import Generator

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def gipip_command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments) -> str:
    result = gipip_command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments) -> str:
    """The one line on stderr, or click's box about an option, as one line."""
    result = gipip_command(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    if result.exit_code == 1:
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
        return line
    return " ".join(line.strip("│ ") for line in result.stderr.splitlines())


@pytest.fixture
def pictures(tmp_path):
    """Two images of the embedded sample, one as it is, one enlarged to a landscape JPEG."""
    batch = gipip.load_dataset("cifar10").private(batch_size=2, seed=0)
    first, second = batch.pixels.permute(0, 2, 3, 1).numpy()
    Image.fromarray(first).save(tmp_path / "first.png")
    Image.fromarray(np.ascontiguousarray(second)).resize((200, 120)).save(tmp_path / "second.jpg")
    return [tmp_path / "first.png", tmp_path / "second.jpg"]


def photographs(folder: Path) -> Path:
    """Twelve images of the embedded sample in three classes."""
    pixels = gipip.load_dataset("cifar10").auxiliary_pool.pixels[:12]
    for number, image in enumerate(pixels):
        path = folder / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)
    return folder


@pytest.fixture(autouse=True)
def tuned_weights(tmp_path_factory, monkeypatch):
    """Tuned weights for the ConvNet and one or two images, in place of those that ship."""
    folder = tmp_path_factory.mktemp("data")
    weights = {
        "InvertingGradients": {"tv_weight": 0.5},
        "GIPIP": {"tv_weight": 0.5, "as_weight": 0.25},
        "GIAS": {"latent_iterations": 2, "latent_restarts": 1},
    }
    conditions = ("cifar10/convnet/B=1", "cifar10/convnet/B=2", "imagenet64/convnet/B=1")
    settings = {condition: weights for condition in conditions}
    (folder / "tuned.json").write_text(json.dumps({"settings": settings}))
    monkeypatch.setattr("gipip.attacks.presets.DATA", folder)


@pytest.fixture
def prior(tmp_path):
    auxiliary = gipip.load_dataset("cifar10").auxiliary(0.002)
    return gipip.train_autoencoder(auxiliary, steps=2).save(tmp_path / "prior.safetensors")


@pytest.fixture
def generator(tmp_path):
    torch.manual_seed(0)
    small = gipip.GenerativePrior(Generator(width=2, latent_size=4))
    return small.save(tmp_path / "generator.safetensors")


@pytest.mark.parametrize(
    "command", [(), ("reproduce",), ("attack",), ("data",), ("train",), ("tune",)]
)
def test_every_command_has_a_help_text_and_helps_with_each_option(command):
    text = succeeds(*command, "--help")
    assert "Usage" in text
    undocumented = [
        line
        for line in text.splitlines()
        if re.match(r"│ +(\*)? +--[\w-]+ +(<[^>]+>)? +(\[.*\] *)?│$", line)
    ]
    assert not undocumented


def test_the_version_is_the_packages():
    assert succeeds("--version") == f"gipip {gipip.__version__}\n"


def test_help_waits_for_no_library_that_computes():
    script = (
        "import sys; from typer.testing import CliRunner; from gipip.cli import app\n"
        "for command in ['attack'], []: CliRunner().invoke(app, [*command, '--help'])\n"
        "print(*{'torch', 'numpy', 'pandas', 'scipy', 'IPython'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "--profile", "gpu"], "Unknown profile: 'gpu'. Known: cpu, paper, smoke."),
        (["reproduce", "--profile", "smoke", "--only", "99"], "Unknown notebook: '99'"),
        (["reproduce", "--profile", "smoke", "--private", "nowhere"], "'nowhere' does not exist"),
        (["data", "mnist"], "'mnist' is not one of 'cifar10', 'imagenet64'"),
        (["data", "imagenet64", "--private", "nowhere"], "'nowhere' does not exist"),
        (["attack", "nowhere.png"], "nowhere.png cannot be read as an image"),
        (["train", "network"], "'network' is not one of 'autoencoder', 'generator'"),
        (["train", "autoencoder", "--data", "nowhere"], "nowhere holds no images"),
        (["train", "autoencoder", "--fraction", "0"], "fraction=0.0 of 50,000 images: expected"),
        (["train", "autoencoder", "--fraction", "nan"], "fraction=nan of 50,000 images: expected"),
        (["train", "generator", "--steps", "-1"], "'--steps'"),
        (["train", "generator", "--seed", "-1"], "'--seed'"),
        (["train", "generator", "--output", "."], "'.' is a directory"),
    ],
)
def test_a_mistake_is_answered_without_a_traceback(arguments, message):
    assert message in fails(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model vgg", "Unknown model 'vgg'. Known models: convnet"),
        (
            "--attack fgsm",
            "Unknown attack 'fgsm'. Known: dlg, features, gias, gipip, gradinversion, ig",
        ),
        ("--attack ig --prior {prior}", "The attack ig takes no prior"),
        ("--prior {generator}", "generator.safetensors holds no autoencoder"),
        ("--attack gias --prior {prior}", "prior.safetensors holds no generator"),
        ("--prior {pictures}", "first.png is no readable safetensors file"),
        ("--prior {folder}", "is no readable safetensors file"),
        ("--prior nowhere.safetensors", "nowhere.safetensors"),
        ("--prior {prior} --size 36", "36"),
        ("--attack gias --prior {generator} --size 48 --model lenet", "48"),
        ("--attack gradinversion --model lenet", "BatchNorm statistics"),
        ("--size 7", "'--size'"),
        ("--size 100000", "'--size'"),
        ("--size big", "'--size'"),
        ("--labels give", "'give' is not one of 'given', 'withheld'"),
        ("--seed -1", "'--seed'"),
        ("--seed 99999999999999999999", "'--seed'"),
        ("--iterations 0", "'--iterations'"),
        ("--output {pictures} --attack ig", "first.png"),
    ],
)
def test_a_bad_option_of_an_attack_is_answered_without_a_traceback(
    options, message, pictures, prior, generator, tmp_path
):
    files = {"prior": prior, "generator": generator, "pictures": pictures[0], "folder": tmp_path}
    assert message in fails("attack", pictures[0], *options.format(**files).split())


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("45s", 45), ("9m", 540), ("1.5h", 5400)]
)
def test_a_budget_is_in_seconds_minutes_or_hours_and_a_pause_ends_with_75(
    text, seconds, monkeypatch
):
    def run(profile, only, *, budget, **options):
        assert budget == seconds
        raise OutOfTime("02_inversion is not finished.")

    monkeypatch.setattr("gipip.reproduce.run", run)
    result = gipip_command("reproduce", "--profile", "paper", "--budget", text)
    assert (result.exit_code, result.stderr) == (75, "02_inversion is not finished.\n")


def test_from_scratch_says_how_long_what_ships_took_and_tells_the_notebooks(monkeypatch):
    given = []
    monkeypatch.setattr("gipip.reproduce.run", lambda *_, **options: given.append(options))
    result = gipip_command("reproduce", "--profile", "cpu", "--from-scratch")
    assert re.search(r"What ships took \d+\.\d hours of one core", result.output)
    assert given[0]["parameters"] == {"from_scratch": True}


@pytest.mark.parametrize("text", ["soon", "9 minutes", "-5", "m", "1e3", ""])
def test_a_budget_that_is_no_duration_is_answered_with_examples(text):
    line = fails("reproduce", "--profile", "paper", f"--budget={text}")
    assert "is no duration" in line and "9m or 2h" in line


def test_a_parameter_that_the_notebook_does_not_declare_is_answered_in_one_line(
    tmp_path, monkeypatch
):
    shutil.copy(NOTEBOOKS / "00_quickstart.ipynb", tmp_path)
    (tmp_path / "profiles.yaml").write_text("profiles: {smoke: {all: {iteration: 1}}}")
    monkeypatch.setattr("gipip.reproduce.notebooks_folder", lambda: tmp_path)
    line = fails("reproduce", "--profile", "smoke")
    assert "Unknown parameter of any notebook: 'iteration'" in line


def test_a_package_that_is_not_installed_is_named_with_the_command_that_brings_it(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path / "cache"))
    line = fails("data", "imagenet64", "--private", photographs(tmp_path / "private"))
    assert "imagehash" in line and "pip install" in line


@pytest.mark.parametrize("content", [b"no picture", b"", b"half"])
def test_a_file_that_is_no_image_is_named(content, pictures, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_bytes(pictures[1].read_bytes()[:500] if content == b"half" else content)
    assert f"{file} cannot be read as an image" in fails("attack", *pictures, file)


def test_a_corrupt_prior_is_named(pictures, prior):
    content = bytearray(prior.read_bytes())
    content[-1] ^= 1
    prior.write_bytes(content)
    line = fails("attack", *pictures, "--prior", prior)
    assert "prior.safetensors" in line and "does not match its checksum" in line


def test_a_file_that_is_no_prior_is_named(pictures, tmp_path):
    other = write_tensors(tmp_path / "other.safetensors", {}, {})
    assert "other.safetensors holds no autoencoder" in fails("attack", *pictures, "--prior", other)


@pytest.mark.parametrize("attack", ["gipip", "ig", "dlg", "gradinversion"])
def test_an_attack_prints_assumptions_and_metrics_and_writes_each_reconstruction(
    attack, pictures, prior, tmp_path
):
    arguments = ["--attack", attack, "--iterations", 3, "--output", tmp_path / "out"]
    arguments += ["--model", "lenet"] if attack == "dlg" else []
    arguments += ["--prior", prior] if attack == "gipip" else []
    text = succeeds("attack", *pictures, *arguments)
    assert "Assumptions: labels:" in text
    columns = r"image +matched +psnr +ssim +ssim_padded +lpips +feature_mse"
    assert re.search(rf"{columns}\n *first\.png .*\n *second\.jpg ", text)
    folder = tmp_path / "out" / f"{attack}-1"
    assert text.endswith(f"with the private images: {folder}\n")
    pictures = {path.name: Image.open(path).size for path in folder.iterdir()}
    side_by_side = pictures.pop("comparison.png")
    assert pictures == {"1.png": (32, 32), "2.png": (32, 32)} and min(side_by_side) > 2 * 256


def test_a_reconstruction_on_disk_is_the_one_that_was_measured(pictures, tmp_path):
    options = ("--attack", "ig", "--iterations", 3, "--output", tmp_path / "out")
    text = succeeds("attack", *pictures, *options)
    printed = re.findall(r"^ *(?:first|second)\.\w+ +\d +([\d.]+)", text, re.MULTILINE)
    for number, (picture, psnr) in enumerate(zip(pictures, printed, strict=True), 1):
        found = Image.open(tmp_path / "out" / "ig-1" / f"{number}.png")
        truth = gipip.load_dataset("cifar10").private(batch_size=2, seed=0).images[number - 1]
        if picture.suffix == ".png":  # the other one is enlarged, and a JPEG
            error = np.square(np.asarray(found) / 255 - truth.permute(1, 2, 0).numpy()).mean()
            assert -10 * np.log10(error) == pytest.approx(float(psnr), abs=0.05)


def test_a_second_attack_keeps_what_the_first_one_wrote(pictures, tmp_path):
    options = ("--attack", "ig", "--iterations", 1, "--output", tmp_path / "out")
    succeeds("attack", pictures[0], *options)
    first = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    succeeds("attack", pictures[1], *options)
    assert first == {path: path.read_bytes() for path in first}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ig-1", "ig-2"}


def test_withheld_labels_are_inferred(pictures, tmp_path):
    options = ("--attack", "ig", "--labels", "withheld", "--iterations", 1, "--output", tmp_path)
    assert "labels: inferred from the last layer" in succeeds("attack", pictures[0], *options)


OWN_MODEL = """
import gipip, torch
from torch import nn

def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(900, 5))

def model():
    return gipip.client_model(network(), (0.5,) * 3, (0.25,) * 3)
"""


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder with a module of the user's, the update of a client with its model, and the weights
    of another network.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own.py").write_text(OWN_MODEL)
    space: dict = {}
    exec(OWN_MODEL, space)
    model, batch = space["model"](), gipip.load_dataset("cifar10").private(2, distinct_labels=False)
    other = gipip.build_model("lenet", 5, seed=7)
    batch = gipip.LabeledImages(batch.pixels, torch.tensor([0, 4]))
    save_file(other.network.state_dict(), tmp_path / "lenet.safetensors")
    gipip.Client(other).share(batch, labels="withheld").save(tmp_path / "lenet-update.safetensors")
    gipip.Client(model).share(batch).save(tmp_path / "update.safetensors")
    yield tmp_path
    sys.modules.pop("own", None)


def test_an_update_from_a_file_is_attacked_with_the_model_of_the_users_code(shared):
    options = ("--model", "own:model", "--attack", "ig", "--iterations", 3)
    text = succeeds("attack", "--update", "update.safetensors", *options)
    assert "labels: given" in text and "psnr" not in text
    assert text.endswith("Reconstructions: results/attack/ig-1\n")
    written = sorted(path.name for path in (shared / "results/attack/ig-1").iterdir())
    assert written == ["1.png", "2.png", "comparison.png"]


def test_an_update_from_a_file_is_attacked_with_weights_from_a_file(shared):
    options = ("--model", "lenet", "--attack", "ig", "--iterations", 3)
    update = ("attack", "--update", "lenet-update.safetensors", *options)
    assert "inferred" in succeeds(*update, "--weights", "lenet.safetensors")
    assert "from other weights" in fails(*update)
    assert "does not hold the model's weights" in fails(*update, "--weights", "update.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "Give pictures, or an update"),
        ("first.png --update update.safetensors", "Give pictures, or an update"),
        ("--update own.py", "own.py is no readable safetensors file"),
        ("--update nowhere", "No such file"),
        ("--update update.safetensors --model none:model", "No module named 'none'"),
        ("--update update.safetensors --model own:none", "has no attribute 'none'.*client_model"),
        ("--update update.safetensors --model own:network", "returns a Sequential; expected"),
        ("--update update.safetensors --model lenet", "from another architecture"),
    ],
)
def test_an_update_or_a_model_that_cannot_be_used_is_named(options, message, shared):
    assert re.search(message, fails("attack", *options.split(), "--attack", "ig"))


def assumptions_of(text) -> dict[str, str]:
    (line,) = [line for line in text.splitlines() if line.startswith("Assumptions: ")]
    parts = re.split(r"; (?=[\w ]+: )", line.removeprefix("Assumptions: "))
    return dict(part.split(": ", 1) for part in parts)


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ("--attack gipip", "1900 images"),
        ("--attack gipip --size 64", "48600 images"),
        ("--attack gias", "1900 images"),
        ("--attack gias --size 64", "48600 images"),
        ("--attack gias --prior {generator}", "an unknown number of images"),
        ("--attack gipip --size 64 --prior {prior}", "100 images"),
    ],
)
def test_the_prior_is_the_files_else_the_one_that_ships_for_the_size(
    options, images, pictures, prior, generator, tmp_path
):
    options = options.format(prior=prior, generator=generator).split()
    options += ["--iterations", "1", "--output", str(tmp_path)]
    assert assumptions_of(succeeds("attack", pictures[0], *options))["auxiliary data"] == images


def test_for_gradinversion_the_client_shares_statistics_and_the_assumptions_say_so(
    pictures, tmp_path
):
    options = ("--iterations", 1, "--output", tmp_path, "--attack")
    said = {
        name: assumptions_of(succeeds("attack", pictures[0], *options, name))["BatchNorm"]
        for name in ("ig", "gradinversion")
    }
    extra = "statistics of the private batch shared (an extra assumption)"
    assert extra in said["gradinversion"] and extra not in said["ig"]


def test_weights_tuned_for_the_condition_are_taken_else_the_defaults_and_said_so(
    pictures, tmp_path, monkeypatch
):
    taken = []
    real = gipip.InvertingGradients.__call__

    def noted(attack, *arguments, **options):
        taken.append(attack)
        return real(attack, *arguments, **options)

    monkeypatch.setattr(gipip.InvertingGradients, "__call__", noted)
    options = ("--attack", "ig", "--iterations", 1, "--seed", 3, "--output", tmp_path)
    tuned = succeeds("attack", pictures[0], *options)
    untuned = succeeds("attack", pictures[0], *options, "--model", "lenet")
    default = gipip.InvertingGradients(iterations=1, seed=3)
    assert taken == [default.model_copy(update={"tv_weight": 0.5}), default]
    sentence = "No weights of InvertingGradients were tuned for cifar10/lenet/B=1"
    assert sentence in untuned and sentence not in tuned


@pytest.mark.skipif(sys.platform != "linux", reason="names in other encodings are Linux's")
def test_a_picture_whose_name_is_not_unicode_is_attacked_as_any_other(pictures, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(pictures[0].read_bytes())
    options = ("--attack", "ig", "--iterations", 1, "--output", tmp_path)
    assert "caf\N{REPLACEMENT CHARACTER}.png" in succeeds("attack", tmp_path / name, *options)


def test_data_lists_what_ships_and_whether_the_full_set_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path))
    text = succeeds("data")
    assert "cifar10-sample.safetensors" in text
    assert str(tmp_path) not in text
    (tmp_path / "cifar10.safetensors").write_bytes(b"0" * 1_000_000)
    assert re.search(rf"1\.0 MB  {tmp_path}", succeeds("data"))


@pytest.mark.parametrize(
    ("what", "kind"), [("autoencoder", gipip.AnomalyScore), ("generator", gipip.GenerativePrior)]
)
def test_a_trained_prior_is_saved_with_its_provenance(what, kind, tmp_path):
    output = tmp_path / "prior.safetensors"
    options = ("--fraction", 0.002, "--steps", 1, "--seed", 1, "--output", output)
    text = succeeds("train", what, *options)
    assert "Trained on 100 images of cifar10." in text and f"Saved: {output}" in text
    made = kind.load(output).provenance
    assert (made["dataset"], made["images"]) == ("cifar10", 100)
    assert {"steps": 1, "seed": 1}.items() <= made["settings"].items()
    auxiliary = gipip.load_dataset("cifar10").auxiliary(0.002, seed=1)
    assert made["data"] == auxiliary.fingerprint


def test_a_prior_is_trained_on_a_folder_of_pictures(tmp_path):
    folder = photographs(tmp_path / "mine")
    output = tmp_path / "prior.safetensors"
    options = ("--data", folder, "--size", 32, "--steps", 1, "--output", output)
    assert "Trained on 6 images of mine." in succeeds("train", "autoencoder", *options)


def test_photographs_are_prepared_and_how_many_were_left_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path / "cache"))
    text = succeeds("data", "imagenet64", "--private", photographs(tmp_path / "private"))
    assert "12 photographs at 64×64; 0 were left out" in text
    assert len(list((tmp_path / "cache").glob("imagenet64-*.safetensors"))) == 1


def test_ctrl_c_ends_with_130_and_without_a_traceback(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("gipip.data.download.download_cifar10", interrupted)
    result = gipip_command("data", "cifar10")
    assert result.exit_code == 130
    assert "Stopped." in result.stderr


# Tuning -------------------------------------------------------------------------


def test_tune_prints_and_writes_what_it_tried_and_chose_and_goes_on_from_the_store(
    tmp_path, monkeypatch
):
    # threads of this process instead: to start others takes seconds, and test_scale_out does
    monkeypatch.setattr("gipip.experiments.sweep.Processes", ThreadPoolExecutor)
    output = tmp_path / "tuned.json"
    options = ["--attack", "ig", "--iterations", 1, "--evaluations", 3, "--images", 2]
    folders = ["--store", tmp_path, "--output", output]
    text = succeeds("tune", *options, *folders)
    study = json.loads(output.read_text())["studies"]["InvertingGradients on cifar10/convnet/B=1"]
    points = [row["settings"]["tv_weight"] for row in study["grid"]]
    assert points == pytest.approx([0.5, 0.5 * 10**0.5, 0.5 / 10**0.5], rel=1e-5)
    assert {(row["images"], row["iterations"]) for row in study["grid"]} == {(2, 1)}
    best = max(study["grid"], key=lambda row: row["psnr"])["settings"]
    settings = json.loads(output.read_text())["settings"]["cifar10/convnet/B=1"]
    assert settings["InvertingGradients"] == best
    assert f"Chosen: tv_weight {best['tv_weight']:g}" in text and f"Saved: {output}" in text
    again = gipip_command("tune", *options, *folders)
    assert again.stdout == text and "to compute" not in again.stderr


def test_tune_refuses_what_has_no_weights():
    assert "DLG has no weight above 0 to tune" in fails("tune", "--attack", "dlg", "--images", 1)

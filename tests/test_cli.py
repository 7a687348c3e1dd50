"""The `gipip` command: what it says, writes and refuses."""

import inspect
import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import gipip
from gipip import cli
from gipip.files import write_tensors


def gipip_command(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeeds(*arguments) -> str:
    result = gipip_command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments) -> str:
    """The one line on stderr."""
    result = gipip_command(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert "Traceback" not in result.stderr
    return line


@pytest.fixture
def pictures(tmp_path):
    """Two images of the embedded sample, one as it is, one enlarged to a landscape JPEG."""
    first, second = gipip.load_dataset("cifar10").private(batch_size=2, seed=0).pixels.permute(0, 2, 3, 1).numpy()
    Image.fromarray(first).save(tmp_path / "first.png")
    Image.fromarray(np.ascontiguousarray(second)).resize((200, 120)).save(tmp_path / "second.jpg")
    return [tmp_path / "first.png", tmp_path / "second.jpg"]


@pytest.fixture(autouse=True)
def tuned_weights(tmp_path_factory, monkeypatch):
    """Tuned weights for the ConvNet and one or two images, in place of those that ship."""
    folder = tmp_path_factory.mktemp("data")
    weights = {"InvertingGradients": {"tv_weight": 0.5}, "GIPIP": {"tv_weight": 0.5, "as_weight": 0.25}}
    (folder / "tuned.json").write_text(json.dumps({"settings": {"cifar10": {"convnet": {"1": weights, "2": weights}}}}))
    monkeypatch.setattr("gipip.attacks.presets.DATA", folder)


@pytest.fixture
def prior(tmp_path):
    auxiliary = gipip.load_dataset("cifar10").auxiliary(0.002)
    return gipip.train_autoencoder(auxiliary, steps=2).save(tmp_path / "prior.safetensors")


@pytest.mark.parametrize("command", [(), ("reproduce",), ("attack",), ("data",), ("train-prior",)])
def test_every_command_has_a_help_text_and_helps_with_each_option(command):
    text = succeeds(*command, "--help")
    assert "Usage" in text
    undocumented = [line for line in text.splitlines() if re.match(r"│ +(\*)? +--[\w-]+ +(<\w+>)? +(\[.*\] *)?│$", line)]
    assert not undocumented


def test_the_version_is_the_packages():
    assert succeeds("--version") == f"gipip {gipip.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "--profile", "gpu"], "Unknown profile: 'gpu'. Known: cpu, paper, smoke."),
        (["reproduce", "--profile", "smoke", "--only", "99"], "Unknown notebook: '99'"),
        (["data", "mnist"], "Unknown data set 'mnist'. Known: cifar10."),
        (["attack", "nowhere.png"], "nowhere.png cannot be read as an image"),
        (["train-prior", "--data", "nowhere"], "nowhere is not a folder"),
        (["train-prior", "--fraction", "0"], "fraction=0.0 selects no part"),
        (["train-prior", "--depth", "6"], "cannot be halved 6 times"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments, message):
    assert message in fails(*arguments)


def test_a_parameter_that_the_notebook_does_not_declare_is_answered_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "profiles.yaml").write_text("profiles: {smoke: {all: {iteration: 1}}}")
    monkeypatch.setattr("gipip.reproduce.notebooks_folder", lambda: tmp_path)
    assert "Unknown parameter of any notebook: 'iteration'" in fails("reproduce", "--profile", "smoke")


def test_an_unknown_model_is_answered_with_the_known_ones(pictures):
    assert "Unknown model 'vgg'. Known models: convnet, lenet, resnet18." in fails("attack", *pictures, "--model", "vgg")


def test_a_file_that_is_no_image_is_named(pictures, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    assert f"{tmp_path / 'notes.txt'} cannot be read as an image" in fails("attack", *pictures, tmp_path / "notes.txt")


def test_a_truncated_image_is_named(pictures):
    pictures[1].write_bytes(pictures[1].read_bytes()[:500])
    assert "second.jpg cannot be read as an image" in fails("attack", *pictures)


def test_a_corrupt_prior_is_named(pictures, prior):
    content = bytearray(prior.read_bytes())
    content[-1] ^= 1
    prior.write_bytes(content)
    assert "prior.safetensors does not match its checksum" in fails("attack", *pictures, "--prior", prior)


def test_a_file_that_is_no_prior_is_named(pictures, tmp_path):
    other = write_tensors(tmp_path / "other.safetensors", {}, {})
    assert "other.safetensors does not hold" in fails("attack", *pictures, "--prior", other)


def test_a_size_that_the_prior_cannot_take_is_refused(pictures, prior):
    assert "--size 36 does not fit the autoencoder, which needs a multiple of 8" in fails(
        "attack", *pictures, "--prior", prior, "--size", 36
    )


def test_a_folder_that_cannot_be_written_is_named(pictures, tmp_path):
    (tmp_path / "taken").touch()
    arguments = ("attack", pictures[0], "--attack", "ig", "--iterations", 1, "--output", tmp_path / "taken")
    assert "taken" in fails(*arguments)


@pytest.mark.parametrize("attack", ["gipip", "ig", "dlg"])
def test_an_attack_on_own_pictures_prints_assumptions_and_metrics_and_writes_the_comparison(attack, pictures, prior, tmp_path):
    network = "lenet" if attack == "dlg" else "convnet"
    arguments = ["--attack", attack, "--model", network, "--iterations", 5, "--output", tmp_path / "out", "--prior", prior]
    text = succeeds("attack", *pictures, *arguments)
    assert "Assumptions: labels:" in text
    assert re.search(r"image +matched +psnr +ssim +lpips +feature_mse\n *first\.png .*\n *second\.jpg ", text)
    assert f"Picture: {tmp_path / 'out' / f'{attack}-{network}.png'}" in text
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".csv", ".pdf", ".png"]


def test_withheld_labels_are_inferred(pictures, prior, tmp_path):
    text = succeeds("attack", pictures[0], "--labels", "withheld", "--iterations", 2, "--prior", prior, "--output", tmp_path)
    assert "labels: inferred from the last layer" in text


def test_weights_tuned_for_the_model_and_batch_size_are_taken(prior):
    attack = cli._build_attack(cli.AttackName.gipip, "convnet", 2, 32, prior, {"seed": 3, "iterations": 7})
    assert (attack.tv_weight, attack.as_weight, attack.prior.offset) == (0.5, 0.25, 0)
    assert (attack.seed, attack.iterations) == (3, 7)


@pytest.mark.parametrize(("model", "batch_size"), [("convnet", 3), ("lenet", 2)])
def test_without_tuned_weights_the_defaults_are_taken_and_said_so(model, batch_size, capsys):
    attack = cli._build_attack(cli.AttackName.ig, model, batch_size, 32, None, {})
    assert attack == gipip.InvertingGradients()
    assert f"No weights were tuned for {model} and {batch_size} images" in capsys.readouterr().out


def test_data_lists_what_ships_and_whether_the_full_set_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path))
    text = succeeds("data")
    assert "cifar10-sample.safetensors" in text
    assert "`gipip data cifar10` downloads it" in text
    (tmp_path / "cifar10.safetensors").write_bytes(b"0" * 1_000_000)
    assert re.search(rf"1\.0 MB  {tmp_path}", succeeds("data"))


def test_a_trained_prior_is_saved_with_its_provenance(tmp_path):
    output = tmp_path / "prior.safetensors"
    text = succeeds("train-prior", "--fraction", 0.002, "--steps", 2, "--width", 4, "--seed", 1, "--output", output)
    assert "Trained on 100 images of cifar10." in text
    assert f"Saved: {output}" in text
    prior = gipip.AnomalyScore.load(output)
    assert f"offset c {prior.offset:.5f}" in text
    assert prior.autoencoder.width == 4
    assert prior.provenance["dataset"] == "cifar10"
    assert prior.provenance["settings"]["steps"] == 2
    assert prior.provenance["images"] == 100


def test_a_prior_is_trained_on_a_folder_of_pictures(pictures, tmp_path):
    for number in range(6):
        folder = tmp_path / "mine" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(pictures[0].read_bytes())
    text = succeeds("train-prior", "--data", tmp_path / "mine", "--size", 32, "--steps", 1, "--output", tmp_path / "prior.safetensors")
    assert "Trained on 3 images of mine." in text


def test_the_training_defaults_are_the_librarys():
    library = inspect.signature(gipip.train_autoencoder).parameters
    command = inspect.signature(cli.train_prior).parameters
    assert {name: command[name].default for name in ("steps", "width", "depth", "seed")} == {
        name: library[name].default for name in ("steps", "width", "depth", "seed")
    }


def test_ctrl_c_ends_with_130_and_without_a_traceback(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "download_cifar10", interrupted)
    result = gipip_command("data", "cifar10")
    assert result.exit_code == 130
    assert "Stopped." in result.stderr

"""The `gipip` command: what it says, writes and refuses."""

import functools
import inspect
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from typer.testing import CliRunner

import gipip
from gipip import cli
from gipip.errors import OutOfTime
from gipip.files import write_tensors
from gipip.priors import Generator


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
    first, second = (
        gipip.load_dataset("cifar10")
        .private(batch_size=2, seed=0)
        .pixels.permute(0, 2, 3, 1)
        .numpy()
    )
    Image.fromarray(first).save(tmp_path / "first.png")
    Image.fromarray(np.ascontiguousarray(second)).resize((200, 120)).save(tmp_path / "second.jpg")
    return [tmp_path / "first.png", tmp_path / "second.jpg"]


@pytest.fixture(autouse=True)
def tuned_weights(tmp_path_factory, monkeypatch):
    """Tuned weights for the ConvNet and one or two images, in place of those that ship."""
    folder = tmp_path_factory.mktemp("data")
    weights = {
        "InvertingGradients": {"tv_weight": 0.5},
        "GIPIP": {"tv_weight": 0.5, "as_weight": 0.25},
    }
    (folder / "tuned.json").write_text(
        json.dumps({"settings": {"cifar10/convnet/B=1": weights, "cifar10/convnet/B=2": weights}})
    )
    monkeypatch.setattr("gipip.attacks.presets.DATA", folder)


@pytest.fixture
def prior(tmp_path):
    auxiliary = gipip.load_dataset("cifar10").auxiliary(0.002)
    return gipip.train_autoencoder(auxiliary, steps=2).save(tmp_path / "prior.safetensors")


@pytest.fixture
def generator(tmp_path):
    torch.manual_seed(0)
    return gipip.GenerativePrior(Generator(width=2, latent_size=4)).save(
        tmp_path / "generator.safetensors"
    )


@pytest.mark.parametrize(
    "command",
    [(), *((name,) for name in ("reproduce", "attack", "data", "train-prior", "train-generator"))],
)
def test_every_command_has_a_help_text_and_helps_with_each_option(command):
    text = succeeds(*command, "--help")
    assert "Usage" in text
    undocumented = [
        line
        for line in text.splitlines()
        if re.match(r"│ +(\*)? +--[\w-]+ +(<\w+>)? +(\[.*\] *)?│$", line)
    ]
    assert not undocumented


def test_the_version_is_the_packages():
    assert succeeds("--version") == f"gipip {gipip.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "--profile", "gpu"], "Unknown profile: 'gpu'. Known: cpu, paper, smoke."),
        (["reproduce", "--profile", "smoke", "--only", "99"], "Unknown notebook: '99'"),
        (["data", "mnist"], "Unknown data set 'mnist'. Known: cifar10, imagenet64."),
        (["attack", "nowhere.png"], "nowhere.png cannot be read as an image"),
        (["train-prior", "--data", "nowhere"], "nowhere is not a folder"),
        (["train-prior", "--fraction", "0"], "fraction=0.0 selects no part"),
        (["train-prior", "--depth", "6"], "cannot be halved 6 times"),
        (["train-generator", "--data", "nowhere"], "nowhere is not a folder"),
        (["train-generator", "--fraction", "0"], "fraction=0.0 selects no part"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments, message):
    assert message in fails(*arguments)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("45s", 45), ("9m", 540), ("1.5h", 5400)]
)
def test_a_budget_is_in_seconds_minutes_or_hours_and_a_pause_ends_with_75(
    text, seconds, monkeypatch
):
    def run(profile, only, *, budget, **options):
        assert budget == seconds
        raise OutOfTime("02_inversion is not finished.")

    monkeypatch.setattr(cli, "run", run)
    result = gipip_command("reproduce", "--profile", "paper", "--budget", text)
    assert (result.exit_code, result.stderr) == (75, "02_inversion is not finished.\n")


@pytest.mark.parametrize("text", ["soon", "9 minutes", "-5", "m", "1e3", ""])
def test_a_budget_that_is_no_duration_is_answered_with_examples(text):
    result = gipip_command("reproduce", "--profile", "paper", f"--budget={text}")
    assert (
        result.exit_code == 2 and "is no duration" in result.stderr and "9m or 2h" in result.stderr
    )


def test_a_parameter_that_the_notebook_does_not_declare_is_answered_in_one_line(
    tmp_path, monkeypatch
):
    (tmp_path / "profiles.yaml").write_text("profiles: {smoke: {all: {iteration: 1}}}")
    monkeypatch.setattr("gipip.reproduce.notebooks_folder", lambda: tmp_path)
    assert "Unknown parameter of any notebook: 'iteration'" in fails(
        "reproduce", "--profile", "smoke"
    )


def test_an_unknown_model_is_answered_with_the_known_ones(pictures):
    assert "Unknown model 'vgg'. Known models: convnet, convnet16, lenet, resnet18." in fails(
        "attack", *pictures, "--model", "vgg"
    )


def test_a_file_that_is_no_image_is_named(pictures, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    assert f"{tmp_path / 'notes.txt'} cannot be read as an image" in fails(
        "attack", *pictures, tmp_path / "notes.txt"
    )


def test_a_truncated_image_is_named(pictures):
    pictures[1].write_bytes(pictures[1].read_bytes()[:500])
    assert "second.jpg cannot be read as an image" in fails("attack", *pictures)


def test_a_corrupt_prior_is_named(pictures, prior):
    content = bytearray(prior.read_bytes())
    content[-1] ^= 1
    prior.write_bytes(content)
    assert "prior.safetensors does not match its checksum" in fails(
        "attack", *pictures, "--prior", prior
    )


def test_a_file_that_is_no_prior_is_named(pictures, tmp_path):
    other = write_tensors(tmp_path / "other.safetensors", {}, {})
    assert "other.safetensors does not hold" in fails("attack", *pictures, "--prior", other)


def test_a_file_that_is_no_generator_is_named(pictures, prior):
    line = fails("attack", *pictures, "--attack", "gias", "--generator", prior)
    assert "prior.safetensors does not hold a generator" in line and "gipip train-generator" in line


def test_pictures_of_another_size_than_the_generators_are_refused(pictures, generator):
    line = fails(
        "attack",
        *pictures,
        "--attack",
        "gias",
        "--generator",
        generator,
        "--size",
        48,
        "--model",
        "lenet",
    )
    assert "The generator makes 32×32 images, but the update is of 48×48" in line


def test_gradinversion_on_a_network_without_batchnorm_is_refused(pictures):
    assert "BatchNorm statistics, which this update does not hold" in fails(
        "attack", *pictures, "--attack", "gradinversion", "--model", "lenet"
    )


def test_a_size_that_the_prior_cannot_take_is_refused(pictures, prior):
    assert "--size 36 does not fit the autoencoder, which needs a multiple of 8" in fails(
        "attack", *pictures, "--prior", prior, "--size", 36
    )


def test_a_folder_that_cannot_be_written_is_named(pictures, tmp_path):
    (tmp_path / "taken").touch()
    arguments = (
        "attack",
        pictures[0],
        "--attack",
        "ig",
        "--iterations",
        1,
        "--output",
        tmp_path / "taken",
    )
    assert "taken" in fails(*arguments)


@pytest.mark.parametrize("attack", ["gipip", "ig", "dlg", "gradinversion"])
def test_an_attack_on_own_pictures_prints_assumptions_and_metrics_and_writes_the_comparison(
    attack, pictures, prior, tmp_path
):
    network = "lenet" if attack == "dlg" else "convnet"
    arguments = [
        "--attack",
        attack,
        "--model",
        network,
        "--iterations",
        3,
        "--output",
        tmp_path / "out",
        "--prior",
        prior,
    ]
    text = succeeds("attack", *pictures, *arguments)
    assert "Assumptions: labels:" in text
    assert re.search(
        r"image +matched +psnr +ssim +lpips +feature_mse\n *first\.png .*\n *second\.jpg ", text
    )
    assert f"Picture: {tmp_path / 'out' / f'{attack}-{network}.png'}" in text
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".csv", ".pdf", ".png"]


def test_withheld_labels_are_inferred(pictures, prior, tmp_path):
    text = succeeds(
        "attack",
        pictures[0],
        "--labels",
        "withheld",
        "--iterations",
        2,
        "--prior",
        prior,
        "--output",
        tmp_path,
    )
    assert "labels: inferred from the last layer" in text


def assumptions_of(text) -> dict[str, str]:
    line = next(
        line for line in text.splitlines() if line.startswith("Assumptions: ")
    ).removeprefix("Assumptions: ")
    return dict(part.split(": ", 1) for part in re.split(r"; (?=[\w ]+: )", line))


def test_gias_searches_the_generator_of_the_file(pictures, generator, tmp_path, monkeypatch):
    quick = functools.partial(gipip.GIAS, latent_iterations=2, latent_restarts=1)
    monkeypatch.setattr(
        cli, "_tuned_or_default", lambda kind, condition, settings: quick(**settings)
    )
    arguments = (
        "--attack",
        "gias",
        "--generator",
        generator,
        "--iterations",
        2,
        "--output",
        tmp_path / "out",
    )
    text = succeeds("attack", pictures[0], *arguments)
    assert (
        assumptions_of(text)["auxiliary data"] == "an unknown number of images"
    )  # the shipped one would say 1900
    assert (tmp_path / "out" / "gias-convnet.png").exists()


def test_gias_takes_the_shipped_generator_unless_told_otherwise(generator):
    shipped, own = (
        cli._prior(cli.AttackName.gias, None, file, 32)["prior"] for file in (None, generator)
    )
    assert shipped.fingerprint == gipip.load_generator("cifar10-3.8%").fingerprint
    assert (
        own.fingerprint == gipip.GenerativePrior.load(generator).fingerprint != shipped.fingerprint
    )


def test_for_gradinversion_the_client_shares_statistics_and_the_assumptions_say_so(
    pictures, tmp_path
):
    texts = {
        name: succeeds(
            "attack", pictures[0], "--attack", name, "--iterations", 1, "--output", tmp_path
        )
        for name in ("ig", "gradinversion")
    }
    extra = "statistics of the private batch shared (an extra assumption)"
    assert {name: extra in assumptions_of(text)["BatchNorm"] for name, text in texts.items()} == {
        "ig": False,
        "gradinversion": True,
    }


def test_a_defended_gradient_is_attacked_as_such_and_the_assumptions_say_so(pictures, tmp_path):
    options = ("--attack", "ig", "--model", "lenet", "--iterations", 1, "--output", tmp_path)
    text = succeeds("attack", pictures[0], *options, "--noise", 0.01, "--sparsity", 0.5)
    assert (
        assumptions_of(text)["defence"]
        == "noise 0.01, then sparsity 0.5; only non-zero entries matched"
    )
    assert "tuned for cifar10/lenet/B=1/noise 0.01/sparsity 0.5" in text
    assert assumptions_of(succeeds("attack", pictures[0], *options))["defence"] == "none"


def test_dlg_takes_on_a_sparsified_gradient_too(pictures, tmp_path):
    options = ("--attack", "dlg", "--model", "lenet", "--iterations", 1, "--output", tmp_path)
    assert (
        assumptions_of(succeeds("attack", pictures[0], *options, "--sparsity", 0.5))["defence"]
        == "sparsity 0.5"
    )


def test_weights_tuned_for_the_condition_are_taken(prior):
    settings = {"seed": 3, "iterations": 7, "prior": gipip.AnomalyScore.load(prior)}
    attack = cli._tuned_or_default(gipip.GIPIP, "cifar10/convnet/B=2", settings)
    assert (attack.tv_weight, attack.as_weight, attack.prior.offset) == (0.5, 0.25, 0)
    assert (attack.seed, attack.iterations) == (3, 7)


@pytest.mark.parametrize("kind", [gipip.InvertingGradients, gipip.GradInversion])
def test_without_tuned_weights_the_defaults_are_taken_and_said_so(kind, capsys):
    assert cli._tuned_or_default(kind, "cifar10/convnet/B=3", {}) == kind()
    assert (
        f"No weights of {kind.__name__} were tuned for cifar10/convnet/B=3"
        in capsys.readouterr().out
    )


def test_data_lists_what_ships_and_whether_the_full_set_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path))
    text = succeeds("data")
    assert "cifar10-sample.safetensors" in text
    assert "`gipip data cifar10` downloads it" in text
    (tmp_path / "cifar10.safetensors").write_bytes(b"0" * 1_000_000)
    assert re.search(rf"1\.0 MB  {tmp_path}", succeeds("data"))


def test_a_trained_prior_is_saved_with_its_provenance(tmp_path):
    output = tmp_path / "prior.safetensors"
    text = succeeds(
        "train-prior",
        "--fraction",
        0.002,
        "--steps",
        2,
        "--width",
        4,
        "--seed",
        1,
        "--output",
        output,
    )
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
    text = succeeds(
        "train-prior",
        "--data",
        tmp_path / "mine",
        "--size",
        32,
        "--steps",
        1,
        "--output",
        tmp_path / "prior.safetensors",
    )
    assert "Trained on 3 images of mine." in text


def test_a_trained_generator_is_saved_with_its_provenance_and_its_kernel_distance_is_printed(
    tmp_path,
):
    output = tmp_path / "generator.safetensors"
    text = succeeds(
        "train-generator",
        "--fraction",
        0.002,
        "--steps",
        1,
        "--width",
        2,
        "--seed",
        1,
        "--output",
        output,
    )
    assert "Trained on 100 images of cifar10." in text and f"Saved: {output}" in text
    prior = gipip.GenerativePrior.load(output)
    assert (
        f"Kernel distance to the auxiliary images {min(prior.provenance['history']['kernel distance']):.5f}"
        in text
    )
    assert (prior.generator.width, prior.generator.image_size) == (2, 32)
    assert prior.provenance["dataset"] == "cifar10" and prior.provenance["images"] == 100
    assert {"steps": 1, "seed": 1}.items() <= prior.provenance["settings"].items()
    assert (
        prior.provenance["data"]
        == gipip.load_dataset("cifar10").auxiliary(0.002, seed=1).fingerprint
    )


@pytest.mark.parametrize(
    ("command", "training", "names"),
    [
        (cli.train_prior, gipip.train_autoencoder, ("steps", "width", "depth", "seed")),
        (cli.train_generator, gipip.train_generator, ("steps", "width", "seed")),
    ],
)
def test_the_training_defaults_are_the_librarys(command, training, names):
    ours, librarys = (inspect.signature(function).parameters for function in (command, training))
    assert {name: ours[name].default for name in names} == {
        name: librarys[name].default for name in names
    }


def test_photographs_are_prepared_and_how_many_were_left_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path / "cache"))
    pixels = gipip.load_dataset("cifar10").auxiliary_pool.pixels[:12]
    for number, image in enumerate(pixels):
        path = tmp_path / "private" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)
    text = succeeds("data", "imagenet64", "--private", tmp_path / "private")
    assert (
        "12 photographs at 64×64; 0 were left out" in text
        and len(list((tmp_path / "cache").glob("imagenet64-*.safetensors"))) == 1
    )


def test_ctrl_c_ends_with_130_and_without_a_traceback(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "download_cifar10", interrupted)
    result = gipip_command("data", "cifar10")
    assert result.exit_code == 130
    assert "Stopped." in result.stderr

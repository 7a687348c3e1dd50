"""The `gipip` command.

gipip's parts are imported when a command needs them, so that `gipip --help` waits for none.
"""

import importlib
import itertools
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

import gipip
from gipip.errors import DataError, GipipError, ModelError, OutOfTime


class _Commands(TyperGroup):
    """Shows what a user can act on as one line instead of a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except OutOfTime as pause:
            _end(str(pause), 75)  # EX_TEMPFAIL of sysexits.h: try again
        except (GipipError, OSError) as error:
            _end(f"Error: {error}", 1)
        except KeyboardInterrupt:
            _end("\nStopped. What was finished is kept; the same command goes on from there.", 130)


def _end(line: str, code: int) -> None:
    typer.secho(line, fg="red" if code == 1 else "yellow", err=True)
    raise typer.Exit(code) from None


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode="markdown",  # so that paragraphs of the help are filled
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, Option("--version", help="Show it.")] = False):
    """Gradient inversion attacks in federated learning, reproduced and fairly judged."""
    if version:
        typer.echo(f"gipip {gipip.__version__}")


def _seconds(text: str) -> float:
    """Of a duration such as 45, 45s, 9m or 2h."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())):
        examples = "Give seconds, minutes or hours, such as 45s, 9m or 2h."
        raise typer.BadParameter(f"{text!r} is no duration. {examples}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


_Attack = Annotated[str, Option("--attack", help="Such as ig; a wrong name lists all.")]
_Auxiliary = Annotated[
    Path | None, Option(exists=True, file_okay=False, help="The attacker's images, as well.")
]
_Budget = Annotated[
    float | None, Option(parser=_seconds, metavar="TIME", help="Pause after 45s, 9m or 2h.")
]
_Iterations = Annotated[int | None, Option(min=1, help="By default the attack's.")]
_Model = Annotated[str, Option(help="resnet18, convnet, lenet, or yours as module:function.")]
_Pictures = Annotated[list[Path] | None, Argument(help="What clients hold.", metavar="PICTURE")]
_Private = Annotated[
    Path | None,
    Option(exists=True, file_okay=False, help="ImageNet photographs, FOLDER/class/image."),
]
_Seed = Annotated[int, Option(min=0, max=2**63 - 1, help="Of all that is random.")]
_Size = Annotated[int, Option(min=32, max=512, help="To which pictures are scaled.")]
_Weights = Annotated[Path | None, Option(help="Its state_dict, as safetensors.")]


@app.command()
def reproduce(
    profile: Annotated[str, Option(help="smoke (minutes), cpu (an hour), paper (hours, a GPU).")],
    only: Annotated[list[str], Option(help="Notebook, such as 02; repeatable.")] = [],  # noqa: B006
    in_place: Annotated[bool, Option("--in-place", help="Keep outputs in the notebooks.")] = False,
    output: Annotated[Path | None, Option(help="Folder of the executed copies.")] = None,
    private: _Private = None,
    auxiliary: _Auxiliary = None,
    budget: _Budget = None,
    from_scratch: Annotated[
        bool, Option("--from-scratch", help="Compute what ships again: many hours.")
    ] = False,
):
    """Run the notebooks and regenerate their figures.

    Every finished attack is kept in the result store: after an interruption the same
    command goes on where it was. With --budget, attacks under way pause, what is left
    is printed, and the exit code is 75: `while gipip reproduce --profile paper --budget
    9m; [ $? = 75 ]; do :; done` runs all of it in pieces. DLG's attacks and trainings
    cannot pause; those begun run to their end.
    """
    from gipip.experiments.shipped import ShippedResults
    from gipip.reproduce import run

    folders = {"private": private, "auxiliary": auxiliary}
    parameters: dict = {name: str(path.resolve()) for name, path in folders.items() if path}
    if from_scratch:
        parameters["from_scratch"] = True
        hours = ShippedResults().seconds / 3600
        print(f"What ships took {hours:.1f} hours of one core, and is computed again here.")
    run(profile, only, in_place=in_place, output=output, parameters=parameters, budget=budget)


@app.command()
def attack(
    images: _Pictures = None,
    update: Annotated[Path | None, Option(help="File of SharedUpdate.save, not PICTURE.")] = None,
    name: _Attack = "gipip",
    model: _Model = "convnet",
    weights: _Weights = None,
    iterations: _Iterations = None,
    labels: Annotated[Literal["given", "withheld"], Option(help="By the client.")] = "given",
    size: _Size = 32,
    prior: Annotated[Path | None, Option(help="File of `gipip train`; else what ships.")] = None,
    seed: _Seed = 0,
    output: Annotated[Path, Option(help="Of a folder a call.")] = Path("results/attack"),
):
    """Reconstruct pictures from the gradient that a client with them would share, or has shared.

    With pictures of your own: writes each reconstruction and all of them below the private images,
    and prints how close they are. With --update: writes what the update gives away. The model is an
    untrained one of gipip's, or what a function of your code returns (gipip.client_model(…)), with
    --weights if they are in a file. Weights of the attack tuned for CIFAR-10, or at 64 pixels for
    ImageNet, are taken where there are any.
    """
    if bool(images) == bool(update):
        raise DataError("Give pictures, or an update: gipip attack --update FILE --model …")
    kind = _attack_named(name)
    settings = {"seed": seed} | ({"iterations": iterations} if iterations else {})
    output.mkdir(parents=True, exist_ok=True)
    updates = [update] if update else []
    client, batch, captured = _client_side(model, weights, images, size, updates)
    statistics: Any = "shared" if kind.needs_statistics else "withheld"
    if batch:
        told = {"labels": labels, "statistics": statistics}
        captured = [gipip.Client(client).share(batch, **told)]
    result = _attacked(kind, client, captured[0], model, prior, settings)
    _describe(result)
    reconstructed = result.images
    if batch:
        metrics = gipip.evaluate(result, batch, model=client)
        names = [typer.format_filename(path, shorten=True) for path in images or ()]
        typer.echo(_table(metrics.assign(image=names)))
        reconstructed = reconstructed[metrics["matched"].tolist()]
    _save_pictures(batch.images if batch else (), reconstructed, output, name)


def _client_side(
    name: str, weights: Path | None, images: list[Path] | None, size: int, updates: list[Path]
) -> "tuple[gipip.ClientModel, gipip.LabeledImages | None, list[gipip.SharedUpdate]]":
    """The model, one of gipip's or what a function of the user's code returns; the
    pictures, if any; and the updates, which must be of that model.
    """
    import torch

    from gipip.data.datasets import load_images

    batch = load_images(images, size) if images else None
    classes = max(10, len(batch or ()))
    for first in updates[:1]:
        update = gipip.SharedUpdate.load(first)
        classes, size = len(update.gradients[-1]), update.image_shape[-1]
    own = ":" in name
    client = _from_code(name) if own else gipip.build_model(name, classes, image_size=size)
    if weights:
        _load_weights(client, weights)
    client.to("cuda" if torch.cuda.is_available() else "cpu")
    return client, batch, [gipip.SharedUpdate.load(path, client) for path in updates]


def _from_code(name: str) -> "gipip.ClientModel":
    """What `module:function` returns; the module is in this folder or installed."""
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as for `python -m`
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"--model {name}: {error}. Expected module:function, a function of a module here that "
            "returns gipip.client_model(network, mean, std)."
        ) from error
    client = build()
    if not isinstance(client, gipip.ClientModel):
        raise ModelError(f"{name} returns a {type(client).__name__}; expected gipip.client_model.")
    return client


def _load_weights(client: "gipip.ClientModel", file: Path) -> None:
    """From a state_dict of the model or of its network, which is never unpickled."""
    import safetensors.torch

    try:
        state = safetensors.torch.load_file(file)
        whole = "normalize.mean" in state
        (client if whole else client.network).load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"{file} does not hold the model's weights ({error}). Write them: "
            "safetensors.torch.save_file(network.state_dict(), file)."
        ) from error


def _attacked(
    kind: "type[gipip.Attack]",
    client: "gipip.ClientModel",
    update: "gipip.SharedUpdate",
    model: str,
    prior: Path | None,
    settings: dict,
) -> "gipip.Reconstruction":
    """With the prior and the weights that there are for this size and model."""
    from gipip.experiments.choices import priors_for

    data = gipip.load_dataset("imagenet64" if update.image_shape[-1] == 64 else "cifar10")
    if prior:
        settings |= _loaded(kind, prior)
    else:
        settings |= priors_for(kind, data, client, update.mode)
    size = update.batch_size
    condition = gipip.Scenario(dataset=data.name, model=model, batch_size=size).condition
    return _configured(kind, condition, settings)(client, update)


def _attack_named(name: str) -> "type[gipip.Attack]":
    if name not in gipip.ATTACKS:
        raise DataError(f"Unknown attack {name!r}. Known: {', '.join(sorted(gipip.ATTACKS))}.")
    return gipip.ATTACKS[name]


def _loaded(kind: "type[gipip.Attack]", file: Path) -> dict:
    """What the attack knows of natural images, from a file."""
    if "prior" not in kind.model_fields:
        raise DataError(f"The attack {kind.name} takes no prior. Leave --prior out.")
    wanted: Any = kind.model_fields["prior"].annotation
    return {"prior": wanted.load(file)}


def _configured(kind: "type[gipip.Attack]", condition: str, settings: dict) -> "gipip.Attack":
    """The attack with these settings, and the weights that were tuned for the condition."""
    from gipip.experiments.choices import tuned_for

    if not (tuned := tuned_for(kind, condition)):
        none = f"No weights of {kind.__name__} were tuned for {condition}"
        typer.echo(f"{none}: taking the attack's defaults.")
    return kind(**tuned | settings)


def _describe(result: "gipip.Reconstruction") -> None:
    """What the attack took for granted, and how it ran."""
    assumptions = "; ".join(f"{name}: {value}" for name, value in result.assumptions.items())
    typer.echo(f"\nAssumptions: {assumptions}")
    typer.echo(f"Engine: {result.engine}, {result.seconds:.0f} s")
    for note in result.notes:
        typer.echo(f"Note: {note}")


def _table(frame) -> str:
    return frame.to_string(index=False, float_format="{:.4g}".format)


def _save_pictures(private, reconstructed, output: Path, name: str) -> None:
    """Each reconstruction, and all in one picture below the private images, if there
    are any, in output/name-1, or the next number that is not taken.
    """
    from torchvision.utils import save_image

    numbered = (output / f"{name}-{number}" for number in itertools.count(1))
    folder = next(path for path in numbered if not path.exists())
    folder.mkdir()
    for number, image in enumerate(reconstructed, 1):
        save_image(image, folder / f"{number}.png")
    rows, scale = [*private, *reconstructed], max(1, 256 // reconstructed.shape[-1])
    enlarged = [row.repeat_interleave(scale, 1).repeat_interleave(scale, 2) for row in rows]
    save_image(enlarged, folder / "comparison.png", nrow=len(reconstructed))
    beside = ", and a comparison with the private images" if len(private) else ""
    typer.echo(f"Reconstructions{beside}: {folder}")


def _defense(text: str) -> Any:
    """Of a name and a strength, such as noise=0.001."""
    from gipip.experiments.arms import defended

    kind, _, strength = text.partition("=")
    try:
        return defended(kind, float(strength))
    except (KeyError, ValueError) as error:
        examples = (
            "Give noise=0.001 (σ), sparsity=0.9, Soteria=0.5 or DP-SGD=0.1 (noise multiplier)."
        )
        raise typer.BadParameter(f"{text!r} is no defence. {examples}") from error


@app.command()
def audit(
    images: _Pictures = None,
    update: Annotated[
        list[Path] | None, Option(help="File of SharedUpdate.save; repeatable.")
    ] = None,
    model: _Model = "convnet",
    weights: _Weights = None,
    defense: Annotated[
        list[Any] | None, Option(parser=_defense, metavar="NAME=STRENGTH", help="Repeatable.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Images in one client's batch.")] = 4,
    steps: Annotated[int, Option(min=0, help="Of local training; 0 is FedSGD.")] = 0,
    learning_rate: Annotated[float, Option(min=0, help="Of local training.")] = 0.01,
    mode: Annotated[Literal["eval", "train"], Option(help="Of BatchNorm.")] = "eval",
    size: _Size = 32,
    minutes: Annotated[float, Option(min=0.1, help="For all attacks together.")] = 10,
    output: Annotated[Path, Option(help="Folder.")] = Path("results/audit"),
):
    """Say what a model's updates give away, as one HTML page and a JSON, within some minutes.

    Of pictures of your own, which a client is simulated to train on, without a defence
    and under each that is given; or of captured updates (--update). What is finished is
    kept: the same command goes on from there.
    """
    client, batch, captured = _client_side(model, weights, images, size, update or [])
    fedavg = gipip.FedAvg(steps=steps, learning_rate=learning_rate) if steps else None
    found = gipip.audit(
        client,
        batch,
        updates=captured,
        defenses=defense or (),
        fedavg=fedavg,
        mode=mode,
        batch_size=batch_size,
        minutes=minutes,
        folder=output,
    )
    typer.echo(str(found))


@app.command()
def data(
    name: Annotated[Literal["cifar10", "imagenet64"] | None, Argument()] = None,
    private: _Private = None,
    auxiliary: _Auxiliary = None,
):
    """List the data and weights at hand; with a name, get more.

    cifar10: download all of it and verify it, 184 MB. imagenet64: prepare private
    photographs from your copy of ImageNet.
    """
    from gipip.data.download import cache_folder, download_cifar10
    from gipip.files import DATA

    if name == "cifar10":
        typer.echo(f"The full CIFAR-10, verified: {download_cifar10()}")
    elif name == "imagenet64":
        gipip.prepare_imagenet(private, auxiliary)
    else:
        for path in sorted([*DATA.glob("*.safetensors"), *cache_folder().glob("*.safetensors")]):
            typer.echo(f"{path.stat().st_size / 1e6:7.1f} MB  {path}")


@app.command()
def train(
    what: Annotated[Literal["autoencoder", "generator"], Argument(help="For gipip, or for gias.")],
    data: Annotated[Path | None, Option(help="FOLDER/class/image; else cifar10.")] = None,
    size: Annotated[int, Option(min=8, max=512, help="Of a folder's images.")] = 64,
    fraction: Annotated[float | None, Option(help="Of the images, such as 0.01.")] = None,
    steps: Annotated[int | None, Option(min=1, help="By default the library's.")] = None,
    seed: _Seed = 0,
    output: Annotated[Path | None, Option(dir_okay=False, help="In results, if not given.")] = None,
):
    """Train what an attacker learns from auxiliary images, for `gipip attack --prior`."""
    dataset = gipip.load_dataset("cifar10")
    if data:
        dataset = gipip.load_dataset("folder", root=data, size=size)
    auxiliary = dataset.auxiliary(fraction, seed=seed)
    training: Any = gipip.train_autoencoder if what == "autoencoder" else gipip.train_generator
    prior = training(auxiliary, seed=seed, **({"steps": steps} if steps else {}))
    prior.provenance["dataset"] = dataset.name
    typer.echo(f"Trained on {len(auxiliary):,} images of {dataset.name}.")
    typer.echo(f"Saved: {prior.save(output or Path('results') / f'{what}.safetensors')}")


@app.command()
def tune(
    name: _Attack = "gipip",
    model: Annotated[
        str, Option(help="Untrained resnet18, convnet, convnet16 or lenet.")
    ] = "convnet",
    batch_size: Annotated[int, Option(min=1, help="Images that the client holds.")] = 1,
    dataset: Annotated[str, Option(help="cifar10, or photographs that you prepared.")] = "cifar10",
    iterations: _Iterations = None,
    evaluations: Annotated[int, Option(min=1, help="How many points are tried.")] = 24,
    images: Annotated[int | None, Option(min=1, help="By default 16, or 32 from B = 8.")] = None,
    workers: Annotated[int | None, Option(min=1, help="Processes; two, or fewer cores.")] = None,
    store: Annotated[Path, Option(help="Of finished attacks.")] = Path("results"),
    output: Annotated[Path, Option(dir_okay=False)] = Path("results/tuned.json"),
):
    """Choose an attack's weights for one condition, on tuning images that are never reported.

    A pattern search from the weights that ship, or the attack's own. Prints every point
    tried and the one of highest mean PSNR, and writes both in the format of
    data/tuned.json. Every finished attack is kept in the store: after an interruption
    the same command goes on where it was.
    """
    import pandas

    from gipip.experiments import tuning
    from gipip.experiments.choices import priors_for

    kind = _attack_named(name)
    statistics = "shared" if kind.needs_statistics else "withheld"
    about = {"dataset": dataset, "model": model, "batch_size": batch_size, "statistics": statistics}
    scenarios = tuning.tuning_units(images, **about)
    condition = scenarios[0].condition
    settings: dict[str, Any] = {**priors_for(kind, gipip.load_dataset(dataset))}
    settings |= {"iterations": iterations} if iterations else {}
    start = _configured(kind, condition, settings)
    how: dict[str, Any] = {"store": store, "workers": workers, "enough": images}
    best, tried = tuning.tune(start, scenarios, evaluations=evaluations, **how)
    points = pandas.DataFrame(tried["settings"].tolist())
    points = points.join(tried.drop(columns=["condition", "arm", "settings"]))
    typer.echo(f"\nTried for {condition}:\n{_table(points)}")
    typer.echo(f"Chosen: {', '.join(f'{name} {value:g}' for name, value in best.items())}")
    path = tuning.write_tuned(
        output, f"{kind.__name__} on {condition}", tried, command="gipip tune"
    )
    typer.echo(f"Saved: {path}")

"""The `gipip` command."""

import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from typer.core import TyperGroup

import gipip
from gipip.data.datasets import load_images
from gipip.data.download import CIFAR10_FILE, cache_folder, download_cifar10
from gipip.errors import DataError, GipipError, OutOfTime
from gipip.figures import image_grid, save_figure, use_style
from gipip.files import DATA
from gipip.reproduce import run

_OUT_OF_TIME = 75  # EX_TEMPFAIL of sysexits.h: try again


class _Commands(TyperGroup):
    """Shows what a user can act on as one line instead of a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except OutOfTime as pause:
            typer.secho(str(pause), fg="yellow", err=True)
            raise typer.Exit(_OUT_OF_TIME) from pause
        except (GipipError, OSError) as error:
            typer.secho(f"Error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.secho(
                "\nStopped. What was finished is kept; the same command goes on from there.",
                fg="yellow",
                err=True,
            )
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


class AttackName(StrEnum):
    gipip = "gipip"
    ig = "ig"
    dlg = "dlg"
    gias = "gias"
    gradinversion = "gradinversion"


_ATTACKS = dict(
    zip(
        AttackName,
        (gipip.GIPIP, gipip.InvertingGradients, gipip.DLG, gipip.GIAS, gipip.GradInversion),
        strict=True,
    )
)


class Labels(StrEnum):
    given = "given"
    withheld = "withheld"


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"gipip {gipip.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
):
    """Gradient inversion attacks in federated learning, reproduced and fairly judged."""


PrivateOption = Annotated[
    Path | None,
    typer.Option(
        help="ImageNet photographs, FOLDER/class/image.", show_default="$GIPIP_DATA/private"
    ),
]
AuxiliaryOption = Annotated[
    Path | None,
    typer.Option(help="The attacker's images, as well.", show_default="$GIPIP_DATA/auxiliary"),
]


def _prepared(private: Path | None, auxiliary: Path | None) -> gipip.Prepared:
    prepared = gipip.prepare_imagenet(private, auxiliary)
    typer.echo(prepared)
    return prepared


def _seconds(text: str) -> float:
    """Of a duration such as 45, 45s, 9m or 2h."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())):
        raise typer.BadParameter(
            f"{text!r} is no duration. Give seconds, minutes or hours, such as 45s, 9m or 2h."
        )
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


Budget = Annotated[
    float | None,
    typer.Option(
        parser=_seconds,
        metavar="TIME",
        help="Stop after 45s, 9m or 2h, with exit code 75 if there is more to do.",
    ),
]


@app.command()
def reproduce(
    profile: Annotated[
        str, typer.Option(help="smoke (minutes), cpu (under an hour), paper (hours on a GPU).")
    ],
    only: Annotated[
        list[str], typer.Option(help="Number or name of a notebook, such as 02; may be repeated.")
    ] = [],  # noqa: B006
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Store the outputs in the notebooks themselves (smoke only)."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the executed copies.", show_default="results/notebooks/PROFILE"
        ),
    ] = None,
    private: PrivateOption = None,
    auxiliary: AuxiliaryOption = None,
    budget: Budget = None,
):
    """Run the notebooks and regenerate their figures.

    Every finished attack is kept in the result store: after an interruption the same
    command goes on where it was. With --budget, attacks under way pause, what is left
    is printed, and the exit code is 75: `while gipip reproduce --profile paper --budget
    9m; [ $? = 75 ]; do :; done` runs all of it in pieces. DLG's attacks and trainings
    cannot pause; those begun run to their end. With the address of a dask scheduler in
    DASK_SCHEDULER_ADDRESS the attacks run on its cluster.
    """
    folders = {"private": private, "auxiliary": auxiliary}
    options = {
        "parameters": {name: str(folder.resolve()) for name, folder in folders.items() if folder},
        "budget": budget,
    }
    finished = run(
        profile,
        only,
        in_place=in_place,
        output=output,
        **options,
        report=lambda line: typer.secho(line, bold=True),
    )
    typer.echo()
    for notebook in finished:
        figures = ", ".join(figure.stem for figure in notebook.figures) or "none"
        typer.echo(f"{notebook.name:<22} {notebook.seconds:6.0f} s   figures: {figures}")
    if finished:
        typer.echo(f"Executed notebooks: {finished[0].copy.parent}")
    for folder in sorted({figure.parent for notebook in finished for figure in notebook.figures}):
        typer.echo(f"Figures: {folder}")


@app.command()
def attack(
    images: Annotated[
        list[Path],
        typer.Argument(help="Pictures, which one client holds as its batch.", metavar="IMAGE"),
    ],
    attack: Annotated[
        AttackName,
        typer.Option(help="For gradinversion the client shares statistics of the batch."),
    ] = AttackName.gipip,
    model: Annotated[
        str, typer.Option(help="The client's untrained network: resnet18, convnet or lenet.")
    ] = "convnet",
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Steps of the optimiser.", show_default="the attack's")
    ] = None,
    labels: Annotated[
        Labels,
        typer.Option(help="Whether the client shares its labels (0, 1, 2, …) with the gradient."),
    ] = Labels.given,
    size: Annotated[
        int, typer.Option(min=32, help="Pixels a side to which pictures are cropped and scaled.")
    ] = 32,
    prior: Annotated[
        Path | None,
        typer.Option(help="GI-PIP's, by `gipip train-prior`.", show_default="the one that ships"),
    ] = None,
    generator: Annotated[
        Path | None,
        typer.Option(help="GIAS's, by `gipip train-generator`.", show_default="the one that ships"),
    ] = None,
    noise: Annotated[
        float,
        typer.Option(
            min=0, help="Standard deviation of the noise that the client adds to its gradient."
        ),
    ] = 0,
    sparsity: Annotated[
        float,
        typer.Option(
            min=0, max=0.999, help="Share of its gradient's entries that the client sets to 0."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the random start.")] = 0,
    engine: Annotated[
        str,
        typer.Option(
            help="How the gradient is computed: auto, eager, traced, compiled, cudagraph."
        ),
    ] = "auto",
    chunk_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images at a time, for less memory.", show_default="all"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the comparison picture.")] = Path(
        "results/attack"
    ),
):
    """Reconstruct your own pictures from the gradient that a client with them would
    share.

    Writes a picture of both, one above the other, and prints how close they are.
    Weights tuned on CIFAR-10 are taken where there are any.
    """
    batch = load_images(images, size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    client = gipip.build_model(model, max(10, len(batch)), image_size=size).to(device)
    defenses = [
        *([gipip.GaussianNoise(std=noise)] if noise else []),
        *([gipip.Sparsification(sparsity=sparsity)] if sparsity else []),
    ]
    condition = gipip.Scenario(model=model, batch_size=len(batch), defenses=defenses).condition
    settings = (
        {"seed": seed}
        | ({"iterations": iterations} if iterations else {})
        | _prior(attack, prior, generator, size)
    )
    if sparsity and attack is not AttackName.dlg:
        settings["masked"] = True
    inverter = _tuned_or_default(_ATTACKS[attack], condition, settings)
    statistics = "shared" if attack is AttackName.gradinversion else "withheld"
    update = gipip.Client(client).share(
        batch, labels=labels.value, statistics=statistics, defenses=defenses
    )
    result = inverter(client, update, engine=engine, chunk_size=chunk_size)
    metrics = gipip.evaluate(result, batch, model=client).assign(
        image=[path.name for path in images]
    )
    typer.echo(
        "\nAssumptions: "
        + "; ".join(f"{name}: {value}" for name, value in result.assumptions.items())
    )
    typer.echo(f"Engine: {result.engine}, {result.seconds:.0f} s")
    for note in result.notes:
        typer.echo(f"Note: {note}")
    typer.echo(metrics.to_string(index=False, float_format="{:.4g}".format))
    use_style()
    rows = {"private": batch.images, "reconstruction": result.images[metrics["matched"].tolist()]}
    figure = image_grid(
        rows, captions={"reconstruction": [f"{value:.1f} dB" for value in metrics["psnr"]]}
    )
    typer.echo(f"Picture: {save_figure(f'{attack.value}-{model}', figure, metrics, output).png}")


def _prior(
    name: AttackName, prior_file: Path | None, generator_file: Path | None, size: int
) -> dict:
    """What the attack knows of natural images, as a setting."""
    if name is AttackName.gias:
        return {
            "prior": gipip.GenerativePrior.load(generator_file)
            if generator_file
            else gipip.load_generator("cifar10-3.8%")
        }
    if name is not AttackName.gipip:
        return {}
    prior = gipip.AnomalyScore.load(prior_file) if prior_file else gipip.load_prior()
    step = 2**prior.autoencoder.depth
    if size % step:
        raise DataError(
            f"--size {size} does not fit the autoencoder, which needs a multiple of {step}."
        )
    return {"prior": prior}


def _tuned_or_default(kind: type[gipip.Attack], condition: str, settings: dict) -> gipip.Attack:
    """The attack, with tuned weights where there are any for the condition, else with
    its defaults.
    """
    if kind is gipip.DLG:  # which has no weights
        return kind(**settings)
    try:
        return kind.tuned(condition, **settings)
    except DataError:
        typer.echo(
            f"No weights of {kind.__name__} were tuned for {condition}: taking the attack's defaults."
        )
        return kind(**settings)


@app.command()
def data(
    name: Annotated[
        str | None,
        typer.Argument(
            help="cifar10: download and verify all of it, 184 MB. imagenet64: from --private."
        ),
    ] = None,
    private: PrivateOption = None,
    auxiliary: AuxiliaryOption = None,
):
    """List the data and weights at hand, download the full CIFAR-10, or prepare private
    photographs from your copy of ImageNet.
    """
    if name not in (None, "cifar10", "imagenet64"):
        raise DataError(
            f"Unknown data set {name!r}. Known: cifar10, imagenet64. For other pictures: load_dataset('folder', root=…)."
        )
    if name == "cifar10":
        typer.echo(f"The full CIFAR-10, verified: {download_cifar10()}")
        return
    if name == "imagenet64":
        _prepared(private, auxiliary)
        return
    typer.echo("Ships with gipip:")
    _list_files(DATA.glob("*.safetensors"))
    typer.echo("The full CIFAR-10:")
    _list_files(cache_folder().glob(CIFAR10_FILE), "not here; `gipip data cifar10` downloads it")
    typer.echo("Private ImageNet photographs:")
    _list_files(
        cache_folder().glob("imagenet64-*.safetensors"),
        "not here; `gipip data imagenet64 --private FOLDER` prepares them",
    )


def _list_files(paths: Iterable[Path], otherwise: str = "none") -> None:
    """A line for each file, with its size."""
    for line in [f"{path.stat().st_size / 1e6:7.1f} MB  {path}" for path in sorted(paths)] or [
        otherwise
    ]:
        typer.echo(f"  {line}")


DataOption = Annotated[
    str,
    typer.Option(
        help="cifar10, or a folder in the layout FOLDER/class/image; half of it stays private."
    ),
]
FractionOption = Annotated[
    float | None,
    typer.Option(help="Share of the images.", show_default="CIFAR-10: 0.038, folder: all"),
]
FullOption = Annotated[
    bool, typer.Option("--full", help="Draw from the full CIFAR-10, after `gipip data cifar10`.")
]
SizeOption = Annotated[
    int | None, typer.Option(min=8, help="Pixels a side.", show_default="CIFAR-10: 32, folder: 64")
]
OutputOption = Annotated[Path, typer.Option(help="File to write.")]
SeedOption = Annotated[
    int, typer.Option(help="Of the auxiliary images, the first weights and the batches.")
]


def _load_data(data: str, size: int | None, full: bool) -> gipip.Dataset:
    folder = None if data == "cifar10" else data
    return gipip.load_dataset("folder" if folder else data, root=folder, size=size, full=full)


@app.command()
def train_prior(
    data: DataOption = "cifar10",
    fraction: FractionOption = None,
    full: FullOption = False,
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps; fewer if the validation loss stops falling.")
    ] = 6_000,
    width: Annotated[int, typer.Option(min=1, help="Channels of the first layer.")] = 12,
    depth: Annotated[int, typer.Option(min=1, help="Layers that halve the image.")] = 3,
    size: SizeOption = None,
    output: OutputOption = Path("results/autoencoder.safetensors"),
    seed: SeedOption = 0,
):
    """Train the autoencoder of GI-PIP's anomaly score on auxiliary images."""
    dataset = _load_data(data, size, full)
    if dataset.image_size % 2**depth:
        raise DataError(
            f"Images of {dataset.image_size} pixels cannot be halved {depth} times. Choose a --size or --depth that fits."
        )
    auxiliary = dataset.auxiliary(fraction, seed=seed)
    prior = gipip.train_autoencoder(auxiliary, width=width, depth=depth, steps=steps, seed=seed)
    losses = prior.provenance["history"]["validation"]
    result = f"Lowest validation loss {min(losses, default=float('nan')):.5f}; offset c {prior.offset:.5f}"
    _save_prior(prior, dataset, output, result)


@app.command()
def train_generator(
    data: DataOption = "cifar10",
    fraction: FractionOption = None,
    full: FullOption = False,
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps; the best checkpoint is kept.")
    ] = 3_000,
    width: Annotated[int, typer.Option(min=1, help="Channels of the last hidden layer.")] = 32,
    size: SizeOption = None,
    output: OutputOption = Path("results/generator.safetensors"),
    seed: SeedOption = 0,
):
    """Train the generator of GIAS on auxiliary images."""
    dataset = _load_data(data, size, full)
    prior = gipip.train_generator(
        dataset.auxiliary(fraction, seed=seed), width=width, steps=steps, seed=seed
    )
    distance = min(prior.provenance["history"]["kernel distance"])
    _save_prior(prior, dataset, output, f"Kernel distance to the auxiliary images {distance:.5f}")


def _save_prior(
    prior: gipip.AnomalyScore | gipip.GenerativePrior,
    dataset: gipip.Dataset,
    output: Path,
    result: str,
) -> None:
    prior.provenance["dataset"] = dataset.name
    typer.echo(f"Trained on {prior.provenance['images']:,} images of {dataset.name}.")
    typer.echo(result)
    typer.echo(f"Saved: {prior.save(output)}")

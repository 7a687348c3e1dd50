"""The `gipip` command.

Commands import the parts of gipip that they need, so that `gipip --help` waits for none of them.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from gipip.errors import DataError, GipipError, OutOfTime

if TYPE_CHECKING:
    import gipip

_OUT_OF_TIME = 75  # EX_TEMPFAIL of sysexits.h: try again


class _Commands(TyperGroup):
    """Shows what a user can act on as one line instead of a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except OutOfTime as pause:
            typer.secho(str(pause), fg="yellow", err=True)
            raise typer.Exit(_OUT_OF_TIME) from pause
        except (GipipError, OSError, ValueError) as error:
            typer.secho(f"Error: {_line(error)}", fg="red", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            kept = "Stopped. What was finished is kept; the same command goes on from there."
            typer.secho(f"\n{kept}", fg="yellow", err=True)
            raise typer.Exit(130) from None


def _line(error: Exception) -> str:
    """The message; of pydantic's, which lists the settings it refuses, on one line."""
    if hasattr(error, "errors"):
        refused = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        return f"{'; '.join(refused)}."
    return str(error)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        import gipip

        typer.echo(f"gipip {gipip.__version__}")
        raise typer.Exit
    return wanted


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
]


@app.callback()
def main(version: Version = False):
    """Gradient inversion attacks in federated learning, reproduced and fairly judged."""


def _seconds(text: str) -> float:
    """Of a duration such as 45, 45s, 9m or 2h."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())):
        examples = "Give seconds, minutes or hours, such as 45s, 9m or 2h."
        raise typer.BadParameter(f"{text!r} is no duration. {examples}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


Private = Annotated[
    Path | None,
    typer.Option(
        help="ImageNet photographs, FOLDER/class/image.", show_default="$GIPIP_DATA/private"
    ),
]
Auxiliary = Annotated[
    Path | None,
    typer.Option(help="The attacker's images, as well.", show_default="$GIPIP_DATA/auxiliary"),
]
Budget = Annotated[
    float | None,
    typer.Option(
        parser=_seconds,
        metavar="TIME",
        help="Stop after 45s, 9m or 2h, with exit code 75 if there is more to do.",
    ),
]
Profile = Annotated[
    str, typer.Option(help="smoke (minutes), cpu (under an hour), paper (hours on a GPU).")
]
Only = Annotated[
    list[str], typer.Option(help="Number or name of a notebook, such as 02; may be repeated.")
]
InPlace = Annotated[
    bool,
    typer.Option("--in-place", help="Store the outputs in the notebooks themselves (smoke only)."),
]
Copies = Annotated[
    Path | None,
    typer.Option(help="Folder of the executed copies.", show_default="results/notebooks/PROFILE"),
]


@app.command()
def reproduce(
    profile: Profile,
    only: Only = [],  # noqa: B006
    in_place: InPlace = False,
    output: Copies = None,
    private: Private = None,
    auxiliary: Auxiliary = None,
    budget: Budget = None,
):
    """Run the notebooks and regenerate their figures.

    Every finished attack is kept in the result store: after an interruption the same command goes
    on where it was. With --budget, attacks under way pause, what is left is printed, and the exit
    code is 75: `while gipip reproduce --profile paper --budget 9m; [ $? = 75 ]; do :; done` runs
    all of it in pieces. DLG's attacks and trainings cannot pause; those begun run to their end.
    """
    from gipip.reproduce import run

    folders = {"private": private, "auxiliary": auxiliary}
    parameters = {name: str(path.resolve()) for name, path in folders.items() if path}
    finished = run(
        profile,
        only,
        in_place=in_place,
        output=output,
        parameters=parameters,
        budget=budget,
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


Pictures = Annotated[
    list[Path],
    typer.Argument(help="Pictures, which one client holds as its batch.", metavar="IMAGE"),
]
AttackName = Annotated[
    str, typer.Option("--attack", help="Such as gipip, ig, dlg, gias, gradinversion.")
]
Model = Annotated[
    str, typer.Option(help="The client's untrained network: resnet18, convnet, lenet.")
]
Iterations = Annotated[
    int | None, typer.Option(min=1, help="Steps of the optimiser.", show_default="the attack's")
]
Labels = Annotated[
    str, typer.Option(help="given: the client shares its labels (0, 1, 2, …); or withheld.")
]
Size = Annotated[int, typer.Option(min=32, help="Pixels a side to which pictures are scaled.")]
PriorFile = Annotated[
    Path | None,
    typer.Option(
        help="Of `gipip train-prior`, for gias of `gipip train-generator`.",
        show_default="the one that ships",
    ),
]
Noise = Annotated[float, typer.Option(min=0, help="Standard deviation of the client's noise.")]
Sparsity = Annotated[
    float, typer.Option(min=0, max=0.999, help="Share of the gradient that the client sets to 0.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the random start.")]
Engine = Annotated[
    str, typer.Option(help="How the gradient is computed: auto, eager, traced, cudagraph.")
]
ChunkSize = Annotated[
    int | None, typer.Option(min=1, help="Images at a time, for less memory.", show_default="all")
]
Numbered = Annotated[Path, typer.Option(help="Folder in which each call makes a numbered one.")]


@app.command()
def attack(
    images: Pictures,
    name: AttackName = "gipip",
    model: Model = "convnet",
    iterations: Iterations = None,
    labels: Labels = "given",
    size: Size = 32,
    prior: PriorFile = None,
    noise: Noise = 0,
    sparsity: Sparsity = 0,
    seed: Seed = 0,
    engine: Engine = "auto",
    chunk_size: ChunkSize = None,
    output: Numbered = Path("results/attack"),
):
    """Reconstruct your own pictures from the gradient that a client with them would share.

    Writes each reconstruction and a picture of all beside the private images, and prints how close
    they are. Weights tuned on CIFAR-10 are taken where there are any.
    """
    import torch

    import gipip
    from gipip.data.datasets import load_images

    kind = _kind(name)
    batch = load_images(images, size)
    client = gipip.build_model(model, max(10, len(batch)), image_size=size)
    client.to("cuda" if torch.cuda.is_available() else "cpu")
    defenses = [gipip.GaussianNoise(std=noise)] if noise != 0 else []
    defenses += [gipip.Sparsification(sparsity=sparsity)] if sparsity else []
    settings = {"seed": seed} | ({"iterations": iterations} if iterations else {})
    if sparsity and "masked" in kind.model_fields:
        settings["masked"] = True
    condition = gipip.Scenario(model=model, batch_size=len(batch), defenses=defenses).condition
    inverter = _tuned_or_default(kind, condition, settings | _prior(kind, prior, size))
    update = gipip.Client(client).share(
        batch,
        labels=labels,
        statistics="shared" if kind.needs_statistics else "withheld",
        defenses=defenses,
    )
    result = inverter(client, update, engine=engine, chunk_size=chunk_size)
    metrics = gipip.evaluate(result, batch, model=client)
    _describe(result, metrics.assign(image=[path.name for path in images]))
    _write(result, batch, metrics, [path.stem for path in images], output)


def _kind(name: str) -> "type[gipip.Attack]":
    from gipip.attacks import ATTACKS

    if name not in ATTACKS:
        raise DataError(f"Unknown attack {name!r}. Known: {', '.join(ATTACKS)}.")
    return ATTACKS[name]


def _prior(kind: "type[gipip.Attack]", file: Path | None, size: int) -> dict:
    """What the attack knows of natural images, as a setting."""
    import gipip

    if "prior" not in kind.model_fields:
        return {}
    wanted = kind.model_fields["prior"].annotation
    if file:
        return {"prior": wanted.load(file)}
    if wanted is gipip.GenerativePrior:
        return {"prior": gipip.load_generator("imagenet64" if size == 64 else "cifar10-3.8%")}
    return {"prior": gipip.load_prior("imagenet64" if size == 64 else "cifar10")}


def _tuned_or_default(kind: "type[gipip.Attack]", condition: str, settings: dict) -> "gipip.Attack":
    """The attack, with tuned weights where there are any for the condition."""
    try:
        return kind.tuned(condition, **settings)
    except DataError:
        typer.echo(
            f"No weights of {kind.__name__} were tuned for {condition}: taking its defaults."
        )
        return kind(**settings)


def _describe(result: "gipip.Reconstruction", metrics) -> None:
    assumptions = "; ".join(f"{name}: {value}" for name, value in result.assumptions.items())
    typer.echo(f"\nAssumptions: {assumptions}")
    typer.echo(f"Engine: {result.engine}, {result.seconds:.0f} s")
    for note in result.notes:
        typer.echo(f"Note: {note}")
    typer.echo(metrics.to_string(index=False, float_format="{:.4g}".format))


def _write(result, batch, metrics, names: list[str], output: Path) -> None:
    """The reconstructions and the comparison, in a new folder."""
    from torchvision.transforms.functional import to_pil_image

    from gipip.figures import image_grid, save_figure, use_style

    folder = _new_folder(output)
    found = result.images[metrics["matched"].tolist()]
    for row, (name, image) in enumerate(zip(names, found, strict=True)):
        to_pil_image(image).save(folder / f"{row:02d}-{name}.png")
    use_style()
    rows = {"private": batch.images, "reconstruction": found}
    captions = {"reconstruction": [f"{value:.1f} dB" for value in metrics["psnr"]]}
    picture = save_figure("comparison", image_grid(rows, captions=captions), metrics, folder)
    typer.echo(f"Picture: {picture.png}")


def _new_folder(output: Path) -> Path:
    """output/1, output/2, …: the first that is not there yet."""
    output.mkdir(parents=True, exist_ok=True)
    number = 1
    while (output / str(number)).exists():
        number += 1
    (output / str(number)).mkdir()
    return output / str(number)


@app.command()
def data(
    name: Annotated[
        str | None,
        typer.Argument(help="cifar10: download and verify it, 184 MB. imagenet64: from --private."),
    ] = None,
    private: Private = None,
    auxiliary: Auxiliary = None,
):
    """List the data and weights at hand, download the full CIFAR-10, or prepare private photographs
    from your copy of ImageNet.
    """
    from gipip.data.download import download_cifar10
    from gipip.data.imagenet import prepare_imagenet

    if name is None:
        _list_data()
    elif name == "cifar10":
        typer.echo(f"The full CIFAR-10, verified: {download_cifar10()}")
    elif name == "imagenet64":
        typer.echo(prepare_imagenet(private, auxiliary))
    else:
        raise DataError(
            f"Unknown data set {name!r}. Known: cifar10, imagenet64. "
            "For other pictures: load_dataset('folder', root=…)."
        )


def _list_data() -> None:
    from gipip.data.download import CIFAR10_FILE, cache_folder
    from gipip.files import DATA

    there = cache_folder()
    _list("Ships with gipip:", DATA.glob("*.safetensors"), "none")
    downloads = "not here; `gipip data cifar10` downloads it"
    _list("The full CIFAR-10:", there.glob(CIFAR10_FILE), downloads)
    prepares = "not here; `gipip data imagenet64 --private FOLDER` prepares them"
    _list("Private ImageNet photographs:", there.glob("imagenet64-*.safetensors"), prepares)


def _list(title: str, paths: Iterable[Path], otherwise: str) -> None:
    typer.echo(title)
    lines = [f"{path.stat().st_size / 1e6:7.1f} MB  {path}" for path in sorted(paths)]
    for line in lines or [otherwise]:
        typer.echo(f"  {line}")


Data = Annotated[
    str, typer.Option(help="cifar10, or a folder, FOLDER/class/image, of which half stays private.")
]
Fraction = Annotated[
    float | None,
    typer.Option(help="Share of the images.", show_default="CIFAR-10: 0.038, folder: all"),
]
Full = Annotated[
    bool, typer.Option("--full", help="Draw from the full CIFAR-10, after `gipip data cifar10`.")
]
Side = Annotated[
    int | None, typer.Option(min=8, help="Pixels a side.", show_default="CIFAR-10: 32, folder: 64")
]
Width = Annotated[int, typer.Option(min=1, help="Channels of the layer nearest to the image.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps, of which the best are kept.")]
Depth = Annotated[int, typer.Option(min=1, help="Layers that halve the image.")]
Output = Annotated[Path, typer.Option(help="File to write.")]
FirstWeights = Annotated[
    int, typer.Option(min=0, help="Of the auxiliary images, the first weights and the batches.")
]


@app.command()
def train_prior(
    data: Data = "cifar10",
    fraction: Fraction = None,
    full: Full = False,
    steps: Steps = 6_000,
    width: Width = 12,
    depth: Depth = 3,
    size: Side = None,
    output: Output = Path("results/autoencoder.safetensors"),
    seed: FirstWeights = 0,
):
    """Train the autoencoder of GI-PIP's anomaly score on auxiliary images."""
    import gipip

    dataset = _dataset(data, size, full)
    auxiliary = dataset.auxiliary(fraction, seed=seed)
    prior = gipip.train_autoencoder(auxiliary, width=width, depth=depth, steps=steps, seed=seed)
    lowest = min(prior.provenance["history"]["validation"], default=float("nan"))
    result = f"Lowest validation loss {lowest:.5f}; offset c {prior.offset:.5f}"
    _save(prior, dataset, output, result)


@app.command()
def train_generator(
    data: Data = "cifar10",
    fraction: Fraction = None,
    full: Full = False,
    steps: Steps = 3_000,
    width: Width = 32,
    size: Side = None,
    output: Output = Path("results/generator.safetensors"),
    seed: FirstWeights = 0,
):
    """Train the generator of GIAS on auxiliary images."""
    import gipip

    dataset = _dataset(data, size, full)
    auxiliary = dataset.auxiliary(fraction, seed=seed)
    prior = gipip.train_generator(auxiliary, width=width, steps=steps, seed=seed)
    distance = min(prior.provenance["history"]["kernel distance"])
    _save(prior, dataset, output, f"Kernel distance to the auxiliary images {distance:.5f}")


def _dataset(data: str, size: int | None, full: bool) -> "gipip.Dataset":
    import gipip

    if data == "cifar10":
        return gipip.load_dataset(data, size=size, full=full)
    return gipip.load_dataset("folder", root=data, size=size, full=full)


def _save(
    prior: "gipip.AnomalyScore | gipip.GenerativePrior",
    dataset: "gipip.Dataset",
    output: Path,
    result: str,
) -> None:
    prior.provenance["dataset"] = dataset.name
    typer.echo(f"Trained on {prior.provenance['images']:,} images of {dataset.name}.")
    typer.echo(result)
    typer.echo(f"Saved: {prior.save(output)}")

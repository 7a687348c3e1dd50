"""A panel for a notebook: choose private images, a defence and an attack, press Start,
and watch the reconstruction arrive beside the truth.
"""

import html
import io
import json
import math
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import ipywidgets
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import gipip
from gipip.data.datasets import load_images
from gipip.errors import DataError
from gipip.experiments.arms import defended
from gipip.experiments.choices import priors_for, tuned_for
from gipip.progress import headless, quiet

_NAMES = ("gipip", "ig", "features", "gias", "dlg")
_ATTACKS = [(gipip.ATTACKS[name].__name__, gipip.ATTACKS[name]) for name in _NAMES]
_NOISE = [defended("noise", std) for std in (0.001, 0.01, 0.1)]
_OTHERS = [defended("sparsity", 0.9), defended("Soteria", 0.5), defended("DP-SGD", 0.01)]
_DEFENSES = [("none", ()), *((str(each), (each,)) for each in (*_NOISE, *_OTHERS))]
_MODELS = ["convnet", "convnet16", "resnet18", "lenet"]
_SHOWN = ("private", "reconstruction", "cost")
_WEIGHTS = ("tv_weight", "as_weight")
_WIDTH, _HEIGHT = 400, 256  # of a picture at most, in pixels: two fit side by side
_REFRESH = 0.5  # seconds between two pictures
_labelled = {"style": {"description_width": "9em"}}
_FOLDER = Path("results/explorer")


def explore(data: gipip.Dataset, prior: gipip.AnomalyScore) -> ipywidgets.VBox | None:
    """The panel of an `Explorer`, as the last expression of a cell; None, and a line
    that says so, when nobody is there to use it.

    `data`: whose private images are attacked, unless pictures are uploaded. `prior`:
    for GI-PIP and the features attack; its offset c is set to 0, for which weights are
    tuned. The decoder of the features attack is trained on the auxiliary images of
    `data`; GIAS takes the generator that ships for `data`. Save writes to the folder
    results/explorer beside the notebook.
    """
    if headless():
        print("The explorer is a live panel: it is built only when a person has the notebook open.")
        return None
    return Explorer(data, prior).panel


class Explorer:
    """Controls, pictures, the cost's curve and a progress bar in `panel`; an attack
    runs in a thread, so that the kernel stays usable.

    The private images go to the client, to the picture beside the reconstruction, and
    to the metrics at the end; never to the attack.
    """

    def __init__(self, data: gipip.Dataset, prior: gipip.AnomalyScore):
        self.data, self.prior = data, prior.with_offset(0)  # as the weights were tuned
        self._model = cache(
            partial(gipip.build_model, image_size=data.image_size, mean=data.mean, std=data.std)
        )
        self._priors = cache(partial(priors_for, data=data, score=self.prior))
        self.thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._shown = 0.0
        self._build()
        self._draw()
        self._weigh()

    # Widgets ------------------------------------------------------------------------

    def _build(self) -> None:
        sizes = [n for n in (1, 4, 8) if n <= len(self.data.private_pool.labels.unique())]
        choice = partial(ipywidgets.Dropdown, **_labelled)
        self.seed = ipywidgets.IntSlider(0, 0, 31, description="private batch", **_labelled)
        self.batch_size = choice(options=sizes, description="batch size")
        self.pictures = ipywidgets.FileUpload(accept="image/*", multiple=True)
        # More than 10 MB breaks Jupyter's connection, and the button with it.
        self.pictures.description = "or your own, below 10 MB"
        self.pictures.layout.width = "300px"
        self.model = choice(options=_MODELS, description="client's model")
        self.defense = choice(options=_DEFENSES, description="client's defence")
        self.attack = choice(options=_ATTACKS, description="attack")
        number = {"min": 1, "max": 10_000, "description": "iterations", **_labelled}
        self.iterations = ipywidgets.BoundedIntText(200, **number)
        weight = partial(ipywidgets.BoundedFloatText, max=1e6, step=1e-3, **_labelled)
        self.tv_weight = weight(description="λ TV")
        self.as_weight = weight(description="λ AS")
        self.origin = ipywidgets.HTML()
        self.start_button = ipywidgets.Button(description="Start", button_style="primary")
        self.stop_button = ipywidgets.Button(description="Stop")
        self.save_button = ipywidgets.Button(description="Save")
        self.bar = ipywidgets.IntProgress(layout={"width": "20em"})
        self.message = ipywidgets.HTML()
        image = partial(ipywidgets.Image, format="png", layout={"flex": "none"})
        self.images = {name: image() for name in _SHOWN}
        self._arrange()
        self._connect()

    def _arrange(self) -> None:
        client = [self.seed, self.batch_size, self.pictures, self.model, self.defense]
        attacker = [self.attack, self.iterations, self.tv_weight, self.as_weight]
        self.controls = [*client, *attacker]
        buttons = [self.start_button, self.stop_button, self.save_button, self.bar]
        below, beside = ipywidgets.VBox, partial(ipywidgets.HBox, layout={"flex_flow": "row wrap"})
        pictures = [below([ipywidgets.Label(name), self.images[name]]) for name in _SHOWN]
        choices = beside([below(client), below(attacker)])
        self.panel = below([choices, self.origin, beside(buttons), self.message, beside(pictures)])

    def _connect(self) -> None:
        self.start_button.on_click(self.start)
        self.stop_button.on_click(self.stop)
        self.save_button.on_click(self.save)
        self.seed.observe(self._draw, "value")
        self.batch_size.observe(self._draw, "value")
        self.pictures.observe(self._read, "value")
        for control in (self.batch_size, self.pictures, self.model, self.defense, self.attack):
            control.observe(self._weigh, "value")

    def _enable(self, running: bool = False) -> None:
        """Only Stop can be used while an attack is running; otherwise all that has an effect."""
        for control in (*self.controls, self.start_button):
            control.disabled = running
        for name in _WEIGHTS:
            getattr(self, name).disabled = running or name not in self.attack.value.model_fields
        self.stop_button.disabled = not running
        self.save_button.disabled = running or not self.record

    # What is chosen -----------------------------------------------------------------

    def _draw(self, *_) -> None:
        """The private images are a batch of the data set, and no uploaded pictures."""
        self._take(self.data.private(self.batch_size.value, self.seed.value))
        self.pictures.value = ()

    def _read(self, *_) -> None:
        """The private images are the uploaded pictures, if there are any."""
        if uploads := self.pictures.value:
            try:
                self._take(_uploaded(uploads, self.data.image_size))
            except DataError as error:
                self._draw()
                self._complain(error)

    def _take(self, batch: gipip.LabeledImages) -> None:
        self.batch = batch
        self.images["private"].value = picture(batch.images)
        self._clear()

    def _clear(self) -> None:
        """Nothing is left of an earlier attack."""
        self.record: dict[str, Any] = {}
        self.images["reconstruction"].value = picture(torch.full_like(self.batch.images, 0.9))
        self.images["cost"].value = curve({})
        self.message.value = ""
        self.bar.value = 0
        self._enable()

    @property
    def scenario(self) -> gipip.Scenario:
        """What is attacked; the pictures themselves are not in it if they were uploaded."""
        return gipip.Scenario(
            dataset=self.data.name,
            model=self.model.value,
            batch_size=len(self.batch),
            seed=self.seed.value,
            defenses=self.defense.value,
        )

    def _weigh(self, *_) -> None:
        """Offer the weights that were tuned for what is chosen, else the attack's own."""
        fields, settings = self.attack.value.model_fields, self.tuned
        for name in _WEIGHTS:
            if name in fields:
                getattr(self, name).value = settings.get(name, fields[name].default)
        whose = "tuned" if settings else "the attack's own, because none were tuned"
        self.origin.value = f"weights: {whose} for {self.scenario.condition}"
        self._enable()

    @property
    def tuned(self) -> dict[str, float]:
        """The attack's settings that were tuned for what is chosen, if any were."""
        return tuned_for(self.attack.value, self.scenario.condition)

    def chosen_attack(self, model: gipip.ClientModel) -> gipip.Attack:
        """The attack on a client's model, with the settings of the controls that it has."""
        kind = self.attack.value
        chosen = {name: getattr(self, name).value for name in ("iterations", *_WEIGHTS)}
        settings = {name: chosen[name] for name in chosen if name in kind.model_fields}
        return kind(**self.tuned | self._priors(kind, client=model) | settings)

    # Running ------------------------------------------------------------------------

    def start(self, *_) -> None:
        """Run the chosen attack in a thread (`self.thread`); does nothing while one is running."""
        if self.thread and self.thread.is_alive():
            return
        self._stopping.clear()
        self._clear()
        self._enable(running=True)
        self.bar.max, self.bar.bar_style = self.iterations.value, ""
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self, *_) -> None:
        """Ask the running attack to end after its present iteration; what it has reached stays."""
        self._stopping.set()
        self.stop_button.disabled = True

    def _run(self) -> None:
        try:
            with quiet():
                self._invert()
        except Exception as error:  # in a thread it would go unseen: it is shown in the panel
            self.bar.bar_style = "danger"
            self._complain(error)
        finally:
            self._enable()

    def _invert(self) -> None:
        model = self._model(self.model.value, max(self.data.num_classes, len(self.batch)))
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        update = gipip.Client(model).share(self.batch, defenses=self.defense.value)
        self._say("preparing what the attack knows of natural images")
        attack = self.chosen_attack(model)
        self._say("running")
        self._costs: list[float] = []
        self._finish(attack, attack(model, update, watch=self._watch, watch_every=1))

    def _watch(self, iteration: int, images: Tensor, cost: float) -> None:
        if self._stopping.is_set():
            raise StopIteration
        self._costs.append(cost)
        if time.monotonic() - self._shown >= _REFRESH:
            self._shown = time.monotonic()
            self._show(iteration, cost, images, {"cost": self._costs})

    def _show(self, done: int, cost: float, images: Tensor, history: Mapping) -> None:
        self.bar.value = done
        self._say(f"{done} iterations, cost {cost:.4g}")
        self.images["reconstruction"].value = picture(images)
        self.images["cost"].value = curve(history)

    def _finish(self, attack: gipip.Attack, result: gipip.Reconstruction) -> None:
        quality = gipip.evaluate(result, self.batch)
        images = result.images[quality["matched"].tolist()]
        done = len(next(iter(result.history.values()))) - 1
        self._show(done, result.cost, images, result.history)
        self.bar.bar_style = "warning" if result.notes else "success"
        means = "PSNR {psnr:.2f} dB, SSIM {ssim:.3f}, LPIPS {lpips:.3f}"
        ran = f"{done} iterations in {result.seconds:.0f} s, cost {result.cost:.4g}"
        self._say("; ".join([means.format(**quality.mean()), ran, *result.notes]))
        self.record = gipip.Run("explorer", self.scenario, attack).config() | {
            "pictures": [upload["name"] for upload in self.pictures.value],
            "assumptions": result.assumptions,
            "notes": result.notes,
            "quality": quality.to_dict("records"),
        }

    def save(self, *_) -> None:
        """Write the pictures, and configuration and quality as result.json, to a folder
        of their own, which the message names.
        """
        folder = _FOLDER.resolve() / time.strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, image in self.images.items():
                (folder / f"{name}.png").write_bytes(image.value)
            (folder / "result.json").write_text(json.dumps(self.record, indent=2))
            self._say(f"saved in {folder}")
        except OSError as error:
            self._complain(error)

    def _say(self, text: str, color: str = "inherit") -> None:
        self.message.value = f'<span style="color: {color}">{html.escape(text)}</span>'

    def _complain(self, error: Exception) -> None:
        self._say(f"{type(error).__name__}: {error}", "var(--jp-error-color1, firebrick)")


def _uploaded(uploads: Sequence[Mapping[str, Any]], size: int) -> gipip.LabeledImages:
    """The pictures that a FileUpload holds, as one client's batch; DataError for what is none."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, Path(upload["name"]).name) for upload in uploads]
        for path, upload in zip(paths, uploads, strict=True):
            path.write_bytes(upload["content"])
        return load_images(paths, size)


def picture(images: Float[Tensor, "batch 3 height width"]) -> bytes:
    """Images in [0, 1] side by side, more than one in two rows, enlarged without
    smoothing to about 400 × 256 pixels, as a PNG.
    """
    rows = min(2, len(images))
    columns = math.ceil(len(images) / rows)
    height, width = images.shape[-2:]
    scale = max(1, min(_WIDTH // (columns * width), _HEIGHT // (rows * height)))
    enlarged = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    file = io.BytesIO()
    grid = make_grid(enlarged, nrow=columns, padding=2, pad_value=1.0)
    to_pil_image(grid).save(file, format="PNG")
    return file.getvalue()


def curve(history: Mapping[str, Sequence[float] | Tensor]) -> bytes:
    """Each term of the cost over the iterations, on a logarithmic axis, as a PNG of 400 × 256."""
    figure = Figure(figsize=(4, 2.56), layout="constrained")  # not pyplot's: for any thread
    axes = figure.subplots()
    axes.set(xlabel="iteration", ylabel="weighted cost")
    for term, values in history.items():
        axes.semilogy(values, label=term)
    if history:
        figure.legend(loc="outside upper center", ncols=2, fontsize="small", frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()

"""A panel for a notebook: choose a private batch and an attack, press Start, and watch the
reconstruction arrive beside the truth.
"""

import html
import io
import math
import threading
import time
from functools import partial

import ipywidgets
import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from gipip.attacks.base import Attack
from gipip.attacks.dlg import DLG
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.view import Reconstruction
from gipip.data.datasets import Dataset, LabeledImages
from gipip.evaluation.metrics import match, psnr, ssim
from gipip.federation.client import Client
from gipip.federation.models import build_model
from gipip.priors.autoencoder import AnomalyScore
from gipip.progress import headless, quiet

_ATTACKS = {"GIPIP": GIPIP, "Inverting Gradients": InvertingGradients, "DLG": DLG}
_WIDTH, _HEIGHT = 400, 256  # of a picture at most, in pixels: two fit side by side
_REFRESH = 0.25  # seconds between two pictures
_DIGITS = [f"{digit}e{power}" for power in range(-6, 1) for digit in (1, 2, 3, 5)]
_WEIGHTS = [("0", 0.0), *((text, float(text)) for text in _DIGITS)]
_labelled = {"style": {"description_width": "9em"}}


def explore(data: Dataset, prior: AnomalyScore) -> ipywidgets.VBox | None:
    """The panel of an `Explorer`, as the last expression of a cell; None, and a line that says so,
    when nobody is there to use it.
    """
    if headless():
        print("The explorer is a live panel: it is built only when a person has the notebook open.")
        return None
    return Explorer(data, prior).panel


class Explorer:
    """Controls, two pictures and a progress bar in `panel`; an attack runs in a thread, so that the
    kernel stays usable.

    The private images go to the client, to the picture beside the reconstruction, and to PSNR and
    SSIM at the end; never to the attack.
    """

    def __init__(self, data: Dataset, prior: AnomalyScore):
        self.data, self.prior = data, prior
        self.thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._shown = 0.0
        self._build()
        self._show_truth()

    # Widgets ------------------------------------------------------------------------

    def _build(self) -> None:
        sizes = [n for n in (1, 4, 8) if n <= len(self.data.private_pool.labels.unique())]
        choice = partial(ipywidgets.Dropdown, **_labelled)
        weight = partial(ipywidgets.SelectionSlider, options=_WEIGHTS, **_labelled)
        self.seed = ipywidgets.IntSlider(0, 0, 31, description="private batch", **_labelled)
        self.batch_size = choice(options=sizes, description="batch size")
        models = ["convnet", "resnet18", "lenet"]
        self.model = choice(options=models, description="client's model")
        self.attack = choice(options=_ATTACKS, description="attack")
        self.tv_weight = weight(value=3e-3, description="λ TV")
        self.as_weight = weight(value=0.2, description="λ anomaly score")
        number = partial(ipywidgets.BoundedIntText, min=1, max=10_000, **_labelled)
        self.iterations = number(200, description="iterations")
        self.start_button = ipywidgets.Button(description="Start", button_style="primary")
        self.stop_button = ipywidgets.Button(description="Stop", disabled=True)
        self.bar = ipywidgets.IntProgress(layout={"width": "20em"})
        self.status, self.message = ipywidgets.Label(), ipywidgets.HTML()
        picture = partial(ipywidgets.Image, format="png", layout={"flex": "none"})
        self.truth, self.reconstruction = picture(), picture()
        choices = [self.seed, self.batch_size, self.model, self.attack]
        self.controls = [*choices, self.tv_weight, self.as_weight, self.iterations]
        self.panel = self._arrange()
        self.start_button.on_click(self.start)
        self.stop_button.on_click(self.stop)
        self.seed.observe(self._show_truth, "value")
        self.batch_size.observe(self._show_truth, "value")
        self.attack.observe(self._offer_weights, "value")

    def _arrange(self) -> ipywidgets.VBox:
        row = partial(ipywidgets.HBox, layout={"flex_flow": "row wrap"})
        columns = [ipywidgets.VBox(self.controls[:4]), ipywidgets.VBox(self.controls[4:])]
        buttons = [self.start_button, self.stop_button, self.bar, self.status]
        private = ipywidgets.Label("private (the attack never sees it)")
        recovered = ipywidgets.Label("reconstruction")
        pictures = [
            ipywidgets.VBox([private, self.truth]),
            ipywidgets.VBox([recovered, self.reconstruction]),
        ]
        parts = [row(columns), ipywidgets.HBox(buttons), self.message, row(pictures)]
        return ipywidgets.VBox(parts)

    def _wait(self, running: bool) -> None:
        """Only Stop can be used while an attack is running, and all but Stop otherwise."""
        for control in (*self.controls, self.start_button):
            control.disabled = running
        self.stop_button.disabled = not running

    def _offer_weights(self, *_) -> None:
        """Disable the weights of terms that the chosen attack does not have."""
        settings = self.attack.value.model_fields
        self.tv_weight.disabled = "tv_weight" not in settings
        self.as_weight.disabled = "as_weight" not in settings

    def _batch(self) -> LabeledImages:
        return self.data.private(batch_size=self.batch_size.value, seed=self.seed.value)

    def _show_truth(self, *_) -> None:
        images = self._batch().images
        self.truth.value = picture(images)
        self.reconstruction.value = picture(torch.full_like(images, 0.9))
        self.message.value = self.status.value = ""
        self.bar.value = 0

    def _say(self, text: str, color: str = "inherit") -> None:
        self.message.value = f'<span style="color: {color}">{html.escape(text)}</span>'

    # Running ------------------------------------------------------------------------

    def start(self, *_) -> None:
        """Run the chosen attack in a thread (`self.thread`); does nothing while one is running."""
        if self.thread and self.thread.is_alive():
            return
        self._stopping.clear()
        self._wait(True)
        self._show_truth()
        self.bar.max, self.bar.bar_style = self.iterations.value, ""
        self._say("running")
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self, *_) -> None:
        """Ask the running attack to end after its present iteration; what it has reached stays."""
        self._stopping.set()
        self.stop_button.disabled = True

    def _run(self) -> None:
        try:
            self._invert()
        except Exception as error:  # in a thread it would go unseen: it is shown in the panel
            self.bar.bar_style = "danger"
            self._say(f"{type(error).__name__}: {error}", color="firebrick")
        finally:
            self._wait(False)
            self._offer_weights()

    def _invert(self) -> None:
        data, batch = self.data, self._batch()
        name, classes, size = self.model.value, data.num_classes, data.image_size
        model = build_model(name, classes, image_size=size, mean=data.mean, std=data.std)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        update = Client(model).share(batch)
        with quiet():
            result = self.chosen_attack()(model, update, watch=self._watch, watch_every=1)
        self._finish(result, batch)

    def chosen_attack(self) -> Attack:
        """The attack with the settings of the controls that it has."""
        offered = {
            "iterations": self.iterations.value,
            "tv_weight": self.tv_weight.value,
            "as_weight": self.as_weight.value,
            "prior": self.prior,
        }
        kind = self.attack.value
        return kind(**{name: offered[name] for name in offered if name in kind.model_fields})

    def _watch(self, iteration: int, images: Tensor, cost: float) -> None:
        if self._stopping.is_set():
            raise StopIteration
        if time.monotonic() - self._shown >= _REFRESH:
            self._shown = time.monotonic()
            self.reconstruction.value = picture(images)
            self._tell(iteration, cost)

    def _tell(self, done: int, cost: float, more: str = "") -> None:
        self.bar.value = done
        self.status.value = f"{done} of {self.bar.max} iterations, cost {cost:.4g}{more}"

    def _finish(self, result: Reconstruction, batch: LabeledImages) -> None:
        images, truth = result.images[match(result.images, batch.images)], batch.images
        self.reconstruction.value = picture(images)
        self.bar.bar_style = "warning" if result.notes else "success"
        done = len(next(iter(result.history.values()))) - 1
        self._tell(done, result.cost, f", {result.seconds:.0f} s")
        quality = f"PSNR {psnr(images, truth).mean():.2f} dB, SSIM {ssim(images, truth).mean():.3f}"
        self._say("; ".join([quality + " (mean)" * (len(batch) > 1), *result.notes]))


def picture(images: Float[Tensor, "batch 3 height width"]) -> bytes:
    """Images in [0, 1] side by side, more than one in two rows, enlarged without smoothing to about
    400 × 256 pixels, as a PNG.
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

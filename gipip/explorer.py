"""A panel for a notebook: choose a private batch and an attack, press Start, and watch
the reconstruction arrive beside the truth.
"""

import html
import io
import math
import threading
import time

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
from gipip.priors import AnomalyScore
from gipip.progress import headless, quiet

_PICTURE_SIZE = 400, 256  # at most so many pixels wide and high: two fit side by side
_REFRESH = 0.25  # seconds between two pictures
_LABEL = {"description_width": "9em"}
_WEIGHTS = [("0", 0.0)] + [
    (f"{digit}e{power}", float(f"{digit}e{power}"))
    for power in range(-6, 1)
    for digit in (1, 2, 3, 5)
]


def explore(data: Dataset, prior: AnomalyScore) -> ipywidgets.VBox | None:
    """The panel of an `Explorer`, as the last expression of a cell; None, and a line
    that says so, when nobody is there to use it.
    """
    if headless():
        print("The explorer is a live panel: it is built only when a person has the notebook open.")
        return None
    return Explorer(data, prior).panel


class Explorer:
    """Controls, two pictures and a progress bar in `panel`; an attack runs in a thread,
    so that the kernel stays usable.

    The private images go to the client, to the picture beside the reconstruction, and
    to PSNR and SSIM at the end; never to the attack.
    """

    def __init__(self, data: Dataset, prior: AnomalyScore):
        self.data, self.prior = data, prior
        self.thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._shown = 0.0
        self._build()
        self._show_truth()

    # Widgets -------------------------------------------------------------------

    def _build(self) -> None:
        self.seed = ipywidgets.IntSlider(0, 0, 31, description="private batch", style=_LABEL)
        sizes = [size for size in (1, 4, 8) if size <= len(self.data.private_pool.labels.unique())]
        self.batch_size = ipywidgets.Dropdown(options=sizes, description="batch size", style=_LABEL)
        self.model = ipywidgets.Dropdown(
            options=["convnet", "resnet18", "lenet"], description="client's model", style=_LABEL
        )
        attacks = {"GIPIP": GIPIP, "Inverting Gradients": InvertingGradients, "DLG": DLG}
        self.attack = ipywidgets.Dropdown(options=attacks, description="attack", style=_LABEL)
        self.tv_weight = ipywidgets.SelectionSlider(
            options=_WEIGHTS, value=3e-3, description="λ TV", style=_LABEL
        )
        self.as_weight = ipywidgets.SelectionSlider(
            options=_WEIGHTS, value=0.2, description="λ anomaly score", style=_LABEL
        )
        self.iterations = ipywidgets.BoundedIntText(
            200, min=1, max=10_000, description="iterations", style=_LABEL
        )
        self.start_button = ipywidgets.Button(description="Start", button_style="primary")
        self.stop_button = ipywidgets.Button(description="Stop", disabled=True)
        self.bar = ipywidgets.IntProgress(layout={"width": "20em"})
        self.status = ipywidgets.Label()
        self.message = ipywidgets.HTML()
        self.truth, self.reconstruction = (
            ipywidgets.Image(format="png", layout={"flex": "none"}) for _ in range(2)
        )
        self.panel = self._arrange()
        self.start_button.on_click(self.start)
        self.stop_button.on_click(self.stop)
        for control in (self.seed, self.batch_size):
            control.observe(self._show_truth, "value")
        self.attack.observe(self._offer_weights, "value")

    def _arrange(self) -> ipywidgets.VBox:
        left = ipywidgets.VBox([self.seed, self.batch_size, self.model, self.attack])
        right = ipywidgets.VBox([self.tv_weight, self.as_weight, self.iterations])
        buttons = ipywidgets.HBox([self.start_button, self.stop_button, self.bar, self.status])
        titles = "private (the attack never sees it)", "reconstruction"
        pictures = [
            ipywidgets.VBox([ipywidgets.Label(t), p])
            for t, p in zip(titles, (self.truth, self.reconstruction), strict=True)
        ]
        row = ipywidgets.Layout(flex_flow="row wrap")
        return ipywidgets.VBox(
            [
                ipywidgets.HBox([left, right], layout=row),
                buttons,
                self.message,
                ipywidgets.HBox(pictures, layout=row),
            ]
        )

    @property
    def _controls(self) -> list[ipywidgets.Widget]:
        return [
            self.seed,
            self.batch_size,
            self.model,
            self.attack,
            self.tv_weight,
            self.as_weight,
            self.iterations,
            self.start_button,
        ]

    def _offer_weights(self, *_) -> None:
        """Disable the weights of terms that the chosen attack does not have."""
        self.tv_weight.disabled = self.attack.value is DLG
        self.as_weight.disabled = self.attack.value is not GIPIP

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

    # Running -------------------------------------------------------------------

    def start(self, *_) -> None:
        """Run the chosen attack in a thread (`self.thread`); does nothing while one is
        running.
        """
        if self.thread and self.thread.is_alive():
            return
        self._stopping.clear()
        for control in self._controls:
            control.disabled = True
        self.stop_button.disabled = False
        self._show_truth()
        self.bar.max, self.bar.bar_style = self.iterations.value, ""
        self._say("running")
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self, *_) -> None:
        """Ask the running attack to end after its present iteration; what it has
        reached stays.
        """
        self._stopping.set()
        self.stop_button.disabled = True

    def _run(self) -> None:
        try:
            self._invert()
        except Exception as error:  # in a thread it would go unseen: it is shown in the panel
            self.bar.bar_style = "danger"
            self._say(f"{type(error).__name__}: {error}", color="firebrick")
        finally:
            for control in self._controls:
                control.disabled = False
            self._offer_weights()
            self.stop_button.disabled = True

    def _invert(self) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        data, batch = self.data, self._batch()
        model = build_model(
            self.model.value,
            data.num_classes,
            image_size=data.image_size,
            mean=data.mean,
            std=data.std,
        ).to(device)
        update = Client(model).share(batch)
        with quiet():
            result = self._chosen_attack()(model, update, watch=self._watch, watch_every=1)
        self._finish(result, batch)

    def _chosen_attack(self) -> Attack:
        settings = {"iterations": self.iterations.value}
        if self.attack.value is not DLG:
            settings["tv_weight"] = self.tv_weight.value
        if self.attack.value is GIPIP:
            settings |= {"prior": self.prior, "as_weight": self.as_weight.value}
        return self.attack.value(**settings)

    def _watch(self, iteration: int, images: Tensor, cost: float) -> None:
        if self._stopping.is_set():
            raise StopIteration
        if time.monotonic() - self._shown >= _REFRESH:
            self._shown = time.monotonic()
            self.reconstruction.value = picture(images)
            self.bar.value = iteration
            self.status.value = f"{iteration} of {self.bar.max} iterations, cost {cost:.4g}"

    def _finish(self, result: Reconstruction, batch: LabeledImages) -> None:
        images = result.images[match(result.images, batch.images)]
        self.reconstruction.value = picture(images)
        self.bar.value = done = len(next(iter(result.history.values()))) - 1
        self.bar.bar_style = "warning" if result.notes else "success"
        self.status.value = (
            f"{done} of {self.bar.max} iterations, cost {result.cost:.4g}, {result.seconds:.0f} s"
        )
        quality = f"PSNR {psnr(images, batch.images).mean():.2f} dB, SSIM {ssim(images, batch.images).mean():.3f}"
        self._say(
            "; ".join([quality + (" (mean of the batch)" if len(batch) > 1 else ""), *result.notes])
        )


def picture(images: Float[Tensor, "batch 3 height width"]) -> bytes:
    """Images in [0, 1] side by side, more than one in two rows, enlarged without
    smoothing to about 400 × 256 pixels, as a PNG.
    """
    rows = min(2, len(images))
    columns = math.ceil(len(images) / rows)
    scale = max(
        1,
        min(
            _PICTURE_SIZE[0] // (columns * images.shape[-1]),
            _PICTURE_SIZE[1] // (rows * images.shape[-2]),
        ),
    )
    enlarged = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    file = io.BytesIO()
    to_pil_image(make_grid(enlarged, nrow=columns, padding=2, pad_value=1.0)).save(
        file, format="PNG"
    )
    return file.getvalue()

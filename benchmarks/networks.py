"""Which image classifiers are attacked, and how: the table in docs/own_model.md.

    python benchmarks/networks.py                # all of them, some minutes on one core
    python benchmarks/networks.py vit_b_16       # one; the others' rows stay

Untrained networks of torchvision for ten classes, and what no torchvision network shows: grey
images, one logit, label smoothing. `attacked` says whether the traced engine gives the gradient of
autograd's double backward, and its derivative, in float64, or is left to that; `features` whether
`recover_features` recovers those of two random images from one update, and of none if not.
Writes benchmarks/results/networks.json and the section of docs/own_model.md.
"""

import argparse
import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from reports import read_rows, write_rows
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import models

import gipip
from gipip.attacks.view import View
from gipip.errors import GipipError

PAGE = Path(__file__).parent.parent / "docs" / "own_model.md"
SECTION = re.compile(
    r"(?<=^<!-- networks: written by benchmarks/networks.py -->\n)"
    r".*?(?=^<!-- end of networks -->$)",
    re.DOTALL | re.MULTILINE,
)


def grey() -> nn.Module:
    """LeNet-5 for MNIST."""
    layers: list[nn.Module] = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)]
    layers += [nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(400, 84), nn.Tanh(), nn.Linear(84, 10))


def group_norm(**options) -> nn.Module:
    return models.resnet18(norm_layer=partial(nn.GroupNorm, 8), **options)


NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], dict]] = {
    "alexnet": (models.alexnet, (3, 64, 64), {}),
    "vgg11": (models.vgg11, (3, 32, 32), {}),
    "resnet18": (models.resnet18, (3, 64, 64), {}),
    "resnet18 with GroupNorm": (group_norm, (3, 64, 64), {}),
    "mobilenet_v2": (models.mobilenet_v2, (3, 64, 64), {}),
    "mobilenet_v3_small": (models.mobilenet_v3_small, (3, 64, 64), {}),
    "efficientnet_b0": (models.efficientnet_b0, (3, 64, 64), {}),
    "densenet121": (models.densenet121, (3, 64, 64), {}),
    "squeezenet1_1": (models.squeezenet1_1, (3, 64, 64), {}),
    "shufflenet_v2_x0_5": (models.shufflenet_v2_x0_5, (3, 64, 64), {}),
    "convnext_tiny": (models.convnext_tiny, (3, 64, 64), {}),
    "swin_t": (models.swin_t, (3, 64, 64), {}),
    "vit_b_16": (partial(models.vit_b_16, image_size=64), (3, 64, 64), {}),
    "LeNet-5, grey images": (lambda num_classes: grey(), (1, 28, 28), {}),
    "resnet18, two classes": (partial(models.resnet18), (3, 224, 224), {"num_classes": 2}),
    "mobilenet_v3_small, one logit": (models.mobilenet_v3_small, (3, 64, 64), {"num_classes": 1}),
}


def client(name: str) -> tuple[gipip.ClientModel, tuple[int, ...]]:
    """An untrained one, and the shape of its images."""
    build, shape, options = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(**{"num_classes": 10} | options)
    return gipip.client_model(network.eval()), shape


def update_of(model: gipip.ClientModel, shape: tuple[int, ...], count: int) -> gipip.SharedUpdate:
    """Of random images; of one class each, as long as there are classes."""
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))
    batch = gipip.LabeledImages(images, torch.arange(count) % 2)
    return gipip.Client(model).share(batch)


class Piecewise(nn.Module):
    """nn.Hardsigmoid in operations with a second derivative, for autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(x + 3) / 6


def differentiable(model: gipip.ClientModel) -> gipip.ClientModel:
    """A copy that computes the same."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Hardsigmoid):
                setattr(module, name, Piecewise())
    return model


def derivative(model: gipip.ClientModel, update: gipip.SharedUpdate, engine: str):
    """The gradient g at other images, the derivative of ⟨g, update⟩ by them, the engine's notes."""
    view = View.of(differentiable(model) if engine == "eager" else model, update, engine)
    images = torch.rand(view.shape, generator=torch.Generator().manual_seed(2)).to(view.target[0])
    with sdpa_kernel(SDPBackend.MATH):  # as in every attack
        gradients = view.gradients(images.requires_grad_(), view.fixed_labels)
        product: Tensor = sum((a * b).sum() for a, b in zip(gradients, view.target, strict=True))
        (slope,) = torch.autograd.grad(product, images)
    return [gradient.detach() for gradient in gradients], slope, view.gradients.notes


def attacked(name: str) -> str:
    """How the gradient is computed, and by which engine it is found to be equal in float64."""
    model, shape = client(name)
    model.double()
    update = update_of(model, shape, 1)
    try:
        expected, slope, _ = derivative(model, update, "eager")
        found, traced_slope, notes = derivative(model, update, "traced")
    except GipipError as error:
        return f"refused: {error}"
    if notes:
        return notes[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(traced_slope, slope, rtol=1e-9, atol=1e-11)
    return "traced"


def features(name: str) -> str:
    """What `recover_features` says of two images, or one where there are two classes."""
    model, shape = client(name)
    count = 2 if "num_classes" not in NETWORKS[name][2] else 1
    try:
        found = gipip.recover_features(model, update_of(model, shape, count))
    except GipipError as error:
        return f"none: {str(error).partition('.')[0]}"
    return found.status


def row(name: str) -> dict[str, str]:
    size = "×".join(map(str, NETWORKS[name][1]))
    return {"network": name, "images": size, "attacked": attacked(name), "features": features(name)}


def section() -> str:
    """What stands between the markers."""
    known = {row["network"]: row for row in read_rows("networks")}
    columns = ["network", "images", "attacked", "features"]
    lines = [columns, ["---"] * len(columns)]
    lines += [[known[name][column] for column in columns] for name in NETWORKS if name in known]
    return "\n".join(["", *(f"| {' | '.join(cells)} |" for cells in lines), "", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=NETWORKS)
    for name in parser.parse_args().names or NETWORKS:
        found = row(name)
        print(*found.values(), sep=" | ", flush=True)
        write_rows("networks", [found], ("network",))
    PAGE.write_text(SECTION.sub(lambda _: section(), PAGE.read_text(), count=1))


if __name__ == "__main__":
    main()

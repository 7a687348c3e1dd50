"""Trains a client's model and keeps it after some epochs of one training:
client-DATASET-NETWORK.safetensors.

`python data/train_client.py cifar10 convnet16` makes the one that ships: epochs 0, 40,
60, 80 and 100, about an hour and a half on one CPU core. Run `gipip data cifar10`
first. The training images are the half of CIFAR-10's training split that the attacker's
auxiliary draws of up to 50 % (seed 0) do not touch.

`python data/train_client.py imagenet64 resnet18 --images FOLDER` trains on photographs
in the layout FOLDER/class/image, nine tenths of them, and puts the file into the cache
folder: with ResNet18 and the same epochs it takes a GPU. `--epochs 0 2 5 10` for fewer.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from gipip.data.datasets import IMAGENET_MEAN, IMAGENET_STD, LabeledImages, load_dataset
from gipip.data.download import cache_folder
from gipip.data.imagenet import SIZE
from gipip.data.photographs import list_folder, read
from gipip.experiments.sweep import provenance
from gipip.federation.models import ClientModel, build_model, trainable
from gipip.federation.training import accuracy
from gipip.files import DATA, write_tensors
from gipip.progress import progress

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=["cifar10", "imagenet64"])
    parser.add_argument("network")
    parser.add_argument("--images", type=Path, help="folder of photographs, for imagenet64")
    parser.add_argument(
        "--epochs",
        type=int,
        nargs="+",
        default=[0, 40, 60, 80, 100],
        help="after which the model is kept",
    )
    options = parser.parse_args()
    if options.dataset == "imagenet64" and options.images is None:
        parser.error("imagenet64 needs --images FOLDER, in the layout FOLDER/class/image")
    training, test, classes, input_ = (
        _cifar10() if options.dataset == "cifar10" else _photographs(options.images)
    )
    folder = DATA if options.dataset == "cifar10" else cache_folder()
    about = {
        "model": options.network,
        "num_classes": classes,
        "input": input_,
        "data": training.fingerprint,
        "images": len(training),
    }
    about |= {
        "command": f"python data/train_client.py {options.dataset} {options.network}",
        "test images": len(test),
        "made": provenance(),
    }
    print(
        train(
            folder / f"client-{options.dataset}-{options.network}.safetensors",
            training,
            test,
            options.epochs,
            about,
        )
    )


def _cifar10() -> tuple[LabeledImages, LabeledImages, int, dict]:
    data = load_dataset("cifar10", full=True)
    training = data.auxiliary_pool[data.auxiliary_pool.shuffled("auxiliary:0")[-25_000:]]
    return training, data.private_pool, data.num_classes, {}


def _photographs(root: Path) -> tuple[LabeledImages, LabeledImages, int, dict]:
    found, pixels = read(list_folder(root), SIZE)
    pool = LabeledImages(pixels, torch.tensor(found.labels))
    rows = found.shuffled("split:0")
    tenth = round(0.1 * len(rows))
    about = {"image_size": SIZE, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return pool[sorted(rows[tenth:])], pool[sorted(rows[:tenth])], 1_000, about


def train(
    target: Path, training: LabeledImages, test: LabeledImages, epochs: list[int], about: dict
) -> Path:
    """Train for the last of the `epochs`, and keep the model after each of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    model = build_model(about["model"], about["num_classes"], **about["input"]).to(device)
    tensors, about = {}, about | {"accuracy": {}, "loss": {}}
    started, losses = time.perf_counter(), epoch_by_epoch(model, training, max(epochs))
    for epoch in range(max(epochs) + 1):
        loss = next(losses) if epoch else None
        if epoch in epochs:
            for name, value in model.state_dict().items():
                tensors[f"{epoch}/{name}"] = value.contiguous().clone()
            about["accuracy"][str(epoch)] = accuracy(model, test)
            about["loss"][str(epoch)] = loss
            about["minutes"] = round((time.perf_counter() - started) / 60, 1)
            right = about["accuracy"][str(epoch)]
            print(f"epoch {epoch}: loss {loss}, accuracy {right:.4f}", flush=True)
            write_tensors(target, tensors, about)
    return target


def epoch_by_epoch(model: ClientModel, images: LabeledImages, epochs: int) -> Iterator[float]:
    """Train in place, as a server's global model is: gives the mean training loss after
    each epoch, with the model in eval mode. The same images give the same weights.

    SGD with momentum 0.9 and weight decay 5e-4 on batches of 128, learning rate falling
    from 0.05 to zero along a cosine, random horizontal flips.
    """
    generator = torch.Generator().manual_seed(0)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps = len(images) // BATCH
    schedule = CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(epochs):
        model.train()
        losses = []
        batches = torch.randperm(len(images), generator=generator).split(BATCH)[:steps]
        for rows in progress(batches, description=f"epoch {epoch + 1}/{epochs}"):
            optimizer.zero_grad()
            loss = _loss(model, images[rows], generator)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        model.eval()
        yield torch.stack(losses).mean().item()


def _loss(model: ClientModel, batch: LabeledImages, generator: torch.Generator) -> Tensor:
    """Of the batch, each image flipped or not."""
    flips = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(flips, batch.images.flip(3), batch.images)
    device = next(model.parameters()).device
    logits = model(images.to(device, memory_format=torch.channels_last))
    return nn.functional.cross_entropy(logits, batch.labels.to(device))


if __name__ == "__main__":
    main()

"""Trains `client-cifar10-convnet16.safetensors`: the small ConvNet after 0, 40, 60, 80 and 100 epochs of one training.

Run `gipip data cifar10` first, then `python data/train_client.py [target]`: about an hour and a half on one CPU core. The training images
are the half of CIFAR-10's training split that the attacker's auxiliary draws of up to 50 % (seed 0) do not touch.
"""

import sys
import time
from pathlib import Path

import torch

from gipip.data import load_dataset, stratified
from gipip.experiments import provenance
from gipip.files import write_tensors
from gipip.models import accuracy, build_model, train_client

NAME, EPOCHS, SHIPPED, IMAGES = "convnet16", 100, (0, 40, 60, 80, 100), 25_000


def train(target: Path) -> Path:
    torch.set_num_threads(1)
    data = load_dataset("cifar10", full=True)
    images = data.auxiliary_pool[stratified(data.auxiliary_pool, "auxiliary:0")[-IMAGES:]]
    model = build_model(NAME, data.num_classes)
    tensors, about = {}, {"model": NAME, "num_classes": data.num_classes, "data": images.fingerprint, "images": len(images)}
    about |= {"command": "python data/train_client.py", "test images": len(data.private_pool), "made": provenance()}
    about |= {"accuracy": {}, "loss": {}}
    started, losses = time.perf_counter(), train_client(model, images, epochs=EPOCHS)
    for epoch in range(EPOCHS + 1):
        loss = next(losses) if epoch else None
        if epoch in SHIPPED:
            tensors |= {f"{epoch}/{name}": value.contiguous().clone() for name, value in model.state_dict().items()}
            about["accuracy"][str(epoch)], about["loss"][str(epoch)] = accuracy(model, data.private_pool), loss
            about["minutes"] = round((time.perf_counter() - started) / 60, 1)
            print(f"epoch {epoch}: loss {loss}, accuracy {about['accuracy'][str(epoch)]:.4f}", flush=True)
            write_tensors(target, tensors, about)
    return target


if __name__ == "__main__":
    print(train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "client-cifar10-convnet16.safetensors"))

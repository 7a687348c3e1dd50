"""Tensors on disk: written whole or not at all, verified when read, never pickled.

The embedded images, trained weights and results are all `safetensors` files written by
`write_tensors`.
"""

import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch

from gipip.errors import DamagedFileError, DataError

T = TypeVar("T")
_PACKAGE = Path(__file__).parent
DATA = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent / "data"
"""Folder of the files that ship with gipip: `data/` of a checkout, `gipip/_data/` of an
installed wheel.
"""


def shipped(kind: str, name: str, advice: str) -> Path:
    """The file DATA/`kind`-`name`.safetensors; DataError, listing what there is and
    ending with `advice`, if it does not ship.
    """
    path = DATA / f"{kind}-{name}.safetensors"
    if not path.exists():
        paths = sorted(DATA.glob(f"{kind}-*.safetensors"))
        known = ", ".join(path.stem.removeprefix(f"{kind}-") for path in paths) or "none"
        raise DataError(f"No {kind} {name!r} ships with gipip. Known: {known}. {advice}")
    return path


def fingerprint(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """SHA-256 (64 hex digits) of named tensors (names, types, shapes, bytes) and an
    optional text.
    """
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def canonical_json(value) -> str:
    """One text for equal values: sorted keys, no white space, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping) -> Path:
    """Write tensors and JSON metadata under a temporary name, then rename: readers see
    all of it or nothing.

    Equal input gives equal bytes. Raises OSError when the folder cannot be written.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = canonical_json(metadata)
    header = {"metadata": text, "sha256": fingerprint(tensors, text)}
    # one entry of metadata, because safetensors writes several in random order
    content = safetensors.torch.save(tensors, {"gipip": canonical_json(header)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of a file by `write_tensors`; `DamagedFileError` if a single
    bit differs from what was written.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names, written = file.keys(), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
        if "gipip" not in written:
            raise ValueError("it was not written by gipip")
        header = json.loads(written["gipip"])
        if fingerprint(tensors, header["metadata"]) != header["sha256"]:
            raise ValueError("it does not match its checksum")
        return tensors, json.loads(header["metadata"])
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        reason = f"{path} is no readable safetensors file by gipip ({error})"
        raise DamagedFileError(f"{reason}. Delete it and make or download it again.") from error


def read_kept(path: Path, read: Callable[[Path], T]) -> T | None:
    """What `read(path)` gives, or None if it has to be computed: there is no such file,
    or it is a damaged one, which is renamed to NAME.damaged-TIME with a warning,
    neither trusted nor lost.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        aside = path.rename(path.with_suffix(f".damaged-{time.time_ns()}"))
        again = f"It is set aside as {aside.name} and computed again."
        warnings.warn(f"{error} {again}", stacklevel=3)
        return None

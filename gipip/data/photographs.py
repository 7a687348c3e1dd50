"""Photographs on disk: folders root/class/image, their pixels, and which show the same
one.
"""

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from jaxtyping import Bool, UInt8, UInt64
from PIL import Image, ImageOps
from torch import Tensor

from gipip.data.drawing import stratified_rows
from gipip.errors import DataError
from gipip.progress import progress

NEAR = 8
"""Perceptual hashes of one photograph differ in at most so many of their 64 bits.

All ImageNet photographs that were that near to another of the attacker's showed the
same one to the eye; of the next nearest, 10 bits away, none did.
"""


@dataclass(frozen=True)
class Photographs:
    """The files root/class/image, in order: class names, and each file's path and
    class.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def __getitem__(self, rows: Sequence[int]) -> "Photographs":
        paths = tuple(self.paths[row] for row in rows)
        return replace(self, paths=paths, labels=tuple(self.labels[row] for row in rows))

    @property
    def names(self) -> list[str]:
        """Paths below root."""
        return [path.relative_to(self.root).as_posix() for path in self.paths]

    def shuffled(self, salt: str) -> list[int]:
        """All rows in the order of `salt`; every beginning holds each class in
        proportion.
        """
        return stratified_rows(self.labels, self.names, salt)


def list_folder(root: Path) -> Photographs:
    """All files of the sub-folders of `root` but hidden ones. DataError when there are
    none.
    """
    folders = sorted(path for path in root.glob("[!.]*") if path.is_dir())
    files: dict[Path, int] = {}
    for label, folder in enumerate(folders):
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        files |= {path: label for path in paths if "/." not in path.relative_to(root).as_posix()}
    if not files:
        raise DataError(f"{root} holds no images. Expected the layout {root}/class/image.")
    classes = tuple(printable(folder.name) for folder in folders)
    return Photographs(root, classes, tuple(files), tuple(files.values()))


def printable(path: Path | str) -> str:
    """A path as text; bytes in it that are no text, as in a Latin-1 name, become
    escapes.
    """
    return os.fsencode(path).decode(errors="backslashreplace")


def read(
    photographs: Photographs, size: int
) -> tuple[Photographs, UInt8[Tensor, "images 3 size size"]]:
    """The readable ones and their pixels, without copies of the same pixels.

    What is left out, one warning says. Raises DataError when nothing is left.
    """
    seen: dict[bytes, Path] = {}
    paths, root = photographs.paths, printable(photographs.root)
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    rows, problems = [], []
    for row, path in enumerate(_shown(paths, f"Reading {root}")):
        try:
            pixels[row] = decode(path, size, round(size * 72 / 64))
            _require_new(path, pixels[row], seen)
            rows.append(row)
        except DataError as error:
            problems.append(str(error))
    if problems:
        skipped = f"Skipped {len(problems)} of {len(paths)} files in {root}. The first of them:"
        warnings.warn(" ".join([skipped, *problems[:10]]), stacklevel=2)
    if not rows:
        raise DataError(f"None of the files in {root} is a readable image.")
    return photographs[rows], pixels[rows]


def _shown(paths: Sequence[Path], description: str) -> Iterable[Path]:
    """With progress, if they take longer than a moment."""
    return progress(paths, description=description, unit="image", delay=5)


def _require_new(path: Path, image: Tensor, seen: dict[bytes, Path]) -> None:
    first = seen.setdefault(hashlib.sha256(image.numpy().tobytes()).digest(), path)
    if first is not path:
        raise DataError(f"{printable(path)} is a copy of {printable(first)}.")


def decode(path: Path, size: int, shorter_side: int) -> UInt8[Tensor, "3 size size"]:
    """Upright RGB: scaled to `shorter_side` pixels, then centre-cropped.

    An image of size × size already is taken as it is. Raises DataError for what is no
    picture of 8 or 16 bits.
    """
    from torchvision.transforms import functional  # takes a second to import

    image = _upright(path)
    if image.size != (size, size):
        image = functional.center_crop(functional.resize(image, shorter_side), size)
    return functional.pil_to_tensor(image)


def perceptual_hashes(photographs: Photographs) -> UInt64[numpy.ndarray, "images"]:
    """pHash of each photograph's central square: 64 bits that hardly change with scale,
    compression and colour; see `NEAR`. Raises DataError without the package imagehash.
    """
    from torchvision.transforms.functional import center_crop

    try:
        from imagehash import phash
    except ImportError as error:
        advice = 'Install it: pip install "gipip[imagenet]".'
        raise DataError(f"Comparing photographs needs the package imagehash. {advice}") from error
    hashes = []
    for path in _shown(photographs.paths, f"Comparing {printable(photographs.root)}"):
        image = _upright(path)
        square = center_crop(image, min(image.size))
        hashes.append(int(str(phash(square)), base=16))
    return numpy.array(hashes, dtype=numpy.uint64)


def near(
    hashes: UInt64[numpy.ndarray, "images"], others: UInt64[numpy.ndarray, "others"]
) -> Bool[numpy.ndarray, "images"]:
    """Which of `hashes` are those of a photograph among the `others`."""
    found = [(numpy.bitwise_count(others ^ value) <= NEAR).any() for value in hashes]
    return numpy.array(found, dtype=bool)


def _upright(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            image = _eight_bit(ImageOps.exif_transpose(file))
            return image.convert("RGBA").convert("RGB")  # palettes may be transparent
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise DataError(
            f"{printable(path)} cannot be read as an image ({type(error).__name__}: {error}). "
            "Expected a picture of 8 or 16 bits, such as a JPEG or PNG file."
        ) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """The picture, of 16 bits a pixel scaled to 8; what has another range is refused."""
    if image.mode.startswith("I;16"):
        values = numpy.asarray(image) / 257  # 65,535 becomes 255
        return Image.fromarray(values.round().astype(numpy.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose range is not known")
    return image

"""Photographs on disk: folders root/class/image, their pixels, and which show the same one."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from jaxtyping import Bool, UInt8, UInt64
from PIL import Image, ImageOps
from torch import Tensor

from gipip.errors import DataError
from gipip.progress import progress

NEAR = 8
"""Perceptual hashes of one photograph differ in at most so many of their 64 bits.

All ImageNet photographs that were that near to another of the attacker's showed the same one to the
eye; of the next nearest, 10 bits away, none did.
"""


@dataclass(frozen=True)
class Photographs:
    """The files root/class/image, in order: class names, and each file's path and class."""

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


def list_folder(root: Path) -> Photographs:
    """All files of the sub-folders of `root` but hidden ones. DataError when there are none."""
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder. Expected images in the layout {root}/class/image."
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    found: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        found += [(path, label) for path in paths if not _hidden(path.relative_to(folder))]
    if not found:
        raise DataError(f"{root} holds no images. Expected the layout {root}/class/image.")
    paths, labels = zip(*found, strict=True)
    return Photographs(root, tuple(folder.name for folder in folders), paths, labels)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read(
    photographs: Photographs, size: int
) -> tuple[Photographs, UInt8[Tensor, "images 3 size size"]]:
    """The readable ones and their pixels.

    Files that cannot be read are named in one warning. Raises DataError when none can.
    """
    paths = photographs.paths
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    readable, problems = [], []
    for row, path in enumerate(_shown(paths, f"Reading {photographs.root.name}")):
        try:
            pixels[row] = decode(path, size, round(size * 72 / 64))
            readable.append(row)
        except DataError as error:
            problems.append(str(error))
    if problems:
        some = f"Skipped {len(problems)} of {len(paths)} files in {photographs.root}"
        warnings.warn(f"{some}: {' '.join(problems)}", stacklevel=2)
    if not readable:
        raise DataError(f"None of the files in {photographs.root} is a readable image.")
    return photographs[readable], pixels[readable]


def decode(path: Path, size: int, shorter_side: int) -> UInt8[Tensor, "3 size size"]:
    """Upright RGB: scaled to `shorter_side` pixels, then centre-cropped.

    An image of size × size already is taken as it is. Raises DataError for what is no picture of 8
    or 16 bits.
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
    paths = _shown(photographs.paths, f"Comparing {photographs.root.name}")
    return numpy.array([_perceptual_hash(path) for path in paths], dtype=numpy.uint64)


def _perceptual_hash(path: Path) -> int:
    try:
        import imagehash
    except ImportError as error:
        advice = 'pip install "gipip[imagenet]"'
        raise DataError(
            f"Photographs are compared with the package imagehash: {advice}."
        ) from error
    image = _upright(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return int(str(imagehash.phash(square)), base=16)


def near(
    hashes: UInt64[numpy.ndarray, "images"], others: UInt64[numpy.ndarray, "others"]
) -> Bool[numpy.ndarray, "images"]:
    """Which of `hashes` are those of a photograph among the `others`."""
    found = [bool((numpy.bitwise_count(others ^ value) <= NEAR).any()) for value in hashes]
    return numpy.array(found, dtype=bool)


def _upright(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(_eight_bit(file))
            if "transparency" in image.info:
                image = image.convert("RGBA")  # between a palette with transparency and RGB
            return image.convert("RGB")
    except Exception as error:  # decoders raise nearly anything on damaged files
        expected = "Expected a picture of 8 or 16 bits, such as a JPEG or PNG file."
        raise DataError(f"{path} cannot be read as an image ({error}). {expected}") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """The picture, of 16 bits a pixel scaled to 8; what has another range is refused."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = numpy.asarray(image).astype(numpy.float64) / 257  # 65,535 becomes 255
        return Image.fromarray(values.round().astype(numpy.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose range is not known")
    return image


def _shown(paths: Sequence[Path], description: str):
    """The paths, with progress when they are many."""
    many = len(paths) >= 2000
    return progress(paths, description=description, unit="image") if many else paths

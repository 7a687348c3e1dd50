"""Photographs on disk: folders in the layout root/class/image, their pixels, and which
of them show the same photograph.
"""

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
"""Perceptual hashes of one photograph differ in at most so many of their 64 bits. Of
1,000 ImageNet photographs 31 were that near to one of 48,600 others, and all of these
showed the same photograph to the eye; of the 48 next nearest, 10 bits away, none did.
"""


@dataclass(frozen=True)
class Photographs:
    """The files root/class/image, in order: class names, and for each file its path and
    the rank of its class.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def __getitem__(self, rows: Sequence[int]) -> "Photographs":
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            labels=tuple(self.labels[row] for row in rows),
        )

    @property
    def names(self) -> list[str]:
        """Paths below root."""
        return [path.relative_to(self.root).as_posix() for path in self.paths]


def list_folder(root: Path) -> Photographs:
    """All files of the sub-folders of `root`. Raises DataError when there are none."""
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder. Expected a folder of images in the layout {root}/class/image."
        )
    classes = sorted(
        folder.name
        for folder in root.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
    )
    inside = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
    ]
    found = [
        (path, label) for path, label in inside if path.is_file() and not path.name.startswith(".")
    ]
    if not found:
        raise DataError(f"{root} holds no images. Expected the layout {root}/class/image.")
    return Photographs(root, tuple(classes), *zip(*found, strict=True))


def read(
    photographs: Photographs, size: int
) -> tuple[Photographs, UInt8[Tensor, "images 3 size size"]]:
    """The readable ones and their pixels; files that cannot be read are named in one
    warning. Raises DataError when none can.
    """
    root, paths = photographs.root, photographs.paths
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    readable, unreadable = [], []
    for row, path in enumerate(_shown(paths, f"Reading {root.name}")):
        try:
            pixels[row] = decode(path, size, round(size * 72 / 64))
            readable.append(row)
        except (
            Exception
        ) as error:  # decoders raise nearly anything on damaged files; each is reported below
            unreadable.append(f"{path.relative_to(root)} ({type(error).__name__})")
    if not unreadable:
        return photographs, pixels
    warnings.warn(
        f"Skipped {len(unreadable)} of {len(paths)} files in {root}, not images: {', '.join(unreadable)}",
        stacklevel=2,
    )
    if not readable:
        raise DataError(
            f"None of the {len(paths)} files in {root} is a readable image. Expected {root}/class/image."
        )
    return photographs[readable], pixels[readable]


def decode(path: Path, size: int, shorter_side: int) -> UInt8[Tensor, "3 size size"]:
    """Upright RGB: scaled to `shorter_side` pixels, then centre-cropped. An image of
    size × size already is taken as it is.
    """
    image = _upright(path)
    if image.size != (size, size):
        image = functional.center_crop(functional.resize(image, shorter_side), size)
    return functional.pil_to_tensor(image)


def perceptual_hashes(photographs: Photographs) -> UInt64[numpy.ndarray, "images"]:
    """pHash of each photograph's central square: 64 bits that hardly change with scale,
    compression and colour; see `NEAR`.
    """
    hashes = [
        _perceptual_hash(path)
        for path in _shown(photographs.paths, f"Comparing {photographs.root.name}")
    ]
    return numpy.array(hashes, dtype=numpy.uint64)


def _perceptual_hash(path: Path) -> int:
    import imagehash  # here, because machines that only attack do without it

    image = _upright(path)
    square = functional.center_crop(image, min(image.size))
    return int(str(imagehash.phash(square)), base=16)


def near(
    hashes: UInt64[numpy.ndarray, "images"], others: UInt64[numpy.ndarray, "others"]
) -> Bool[numpy.ndarray, "images"]:
    """Which of `hashes` are those of a photograph among the `others`."""
    return numpy.array(
        [bool((numpy.bitwise_count(others ^ value) <= NEAR).any()) for value in hashes], dtype=bool
    )


def _upright(path: Path) -> Image.Image:
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if "transparency" in image.info:
            image = image.convert(
                "RGBA"
            )  # Pillow wants this step between a palette with transparency and RGB
        return image.convert("RGB")


def _shown(paths: Sequence[Path], description: str):
    """The paths, with progress when they are many."""
    return progress(paths, description=description, unit="image") if len(paths) >= 2000 else paths

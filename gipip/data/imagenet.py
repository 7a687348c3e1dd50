"""Private photographs at 64 × 64 from your own copy of ImageNet, without those that the
attacker owns.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from jaxtyping import UInt64

from gipip.data.datasets import IMAGENET64_SAMPLE, LabeledImages, named_tensors, require_whole
from gipip.data.download import cache_folder
from gipip.data.photographs import Photographs, list_folder, near, perceptual_hashes, read
from gipip.errors import DataError
from gipip.files import DATA, read_tensors, write_tensors

SIZE = 64
HASHES = DATA / "hashes-imagenet64.safetensors"
"""Perceptual hashes of the images that the shipped priors for ImageNet at 64 × 64 were
trained on.
"""
_TUNING_FRACTION = 0.1


class Prepared(NamedTuple):
    """A data set of private photographs: its name for `load_dataset` and `Scenario`,
    and how it came about.

    `images`: photographs it holds. `excluded`: those left out because they are among
    the `compared` different photographs that the attacker owns (the given folder's and
    those of the shipped priors).
    """

    dataset: str
    images: int
    excluded: int
    compared: int

    def __str__(self) -> str:
        return (
            f"{self.dataset}: {self.images:,} photographs at {SIZE}×{SIZE}; {self.excluded} were "
            f"left out, because they are among the {self.compared:,} photographs that the attacker "
            "owns."
        )


def prepare_imagenet(
    private: Path | str | None = None, auxiliary: Path | str | None = None, limit: int = 1_000
) -> Prepared:
    """Make a data set of private photographs, once; its name says which files it was
    made of.

    `private`, `auxiliary`: folders in the layout root/class/image, such as
    torchvision's ImageNet and Tiny ImageNet's training images; the label is the rank of
    the class folder's name, as usual for ImageNet's 1,000. Of `private` at most `limit`
    photographs are taken, each class in proportion, a tenth of them for tuning: the
    shorter side is scaled to 72 pixels, then the central 64 × 64 are kept. What shows
    the same photograph as one of `auxiliary` or of the shipped priors' images is left
    out (perceptual hashes, see `gipip.data.photographs`).

    Without private photographs this gives the 20 that ship. Raises DataError for
    folders that cannot be used.
    """
    require_whole("limit", limit, least=1)
    if not private:
        return _described(IMAGENET64_SAMPLE)
    photographs = list_folder(Path(private))
    known = list_folder(Path(auxiliary)) if auxiliary else None
    path = cache_folder() / f"imagenet64-{_identity(photographs, known, limit)}.safetensors"
    if not path.exists():
        _make(path, photographs, known, limit)
    return _described(path)


def _identity(private: Photographs, auxiliary: Photographs | None, limit: int) -> str:
    """Eight hex digits for the names and sizes of all files."""
    digest = hashlib.sha256(str(limit).encode())
    for photographs in filter(None, (private, auxiliary)):
        for name, path in zip(photographs.names, photographs.paths, strict=True):
            entry = f"\n{name} {path.stat().st_size}"
            digest.update(entry.encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()[:8]


def _make(path: Path, private: Photographs, auxiliary: Photographs | None, limit: int) -> None:
    chosen, pixels = read(private[private.shuffled("limit")[:limit]], SIZE)
    owned = numpy.unique(shipped_hashes())
    if auxiliary:
        owned = numpy.union1d(owned, perceptual_hashes(auxiliary))
    new = (~near(perceptual_hashes(chosen), owned)).nonzero()[0].tolist()
    rows = [new[row] for row in chosen[new].shuffled("split:0")]
    tuning = round(_TUNING_FRACTION * len(rows))
    if not 0 < tuning < len(rows):
        raise DataError(
            f"{private.root} holds {len(rows)} usable photographs: too few for a tuning and a "
            "private part. Give at least 10."
        )
    pool = LabeledImages(pixels, torch.tensor(chosen.labels))
    parts = {"tuning": pool[sorted(rows[:tuning])], "private": pool[sorted(rows[tuning:])]}
    excluded = len(chosen.paths) - len(rows)
    about = {"images": len(rows), "excluded": excluded, "compared": len(owned)}
    write_tensors(path, named_tensors(**parts), about)


def _described(path: Path) -> Prepared:
    _, about = read_tensors(path)
    name = "imagenet64" if path == IMAGENET64_SAMPLE else path.stem
    return Prepared(name, about["images"], about["excluded"], about["compared"])


def shipped_hashes() -> UInt64[numpy.ndarray, "images"]:
    """Perceptual hashes of all images that the shipped priors for ImageNet at 64 × 64
    were trained on.
    """
    tensors, _ = read_tensors(HASHES)
    return tensors["hashes"].numpy().view(numpy.uint64)

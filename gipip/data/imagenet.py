"""Private photographs at 64 × 64 from your own copy of ImageNet, without those that the
attacker owns.
"""

import hashlib
from pathlib import Path

import numpy
import torch
from jaxtyping import UInt64

from gipip.data.datasets import IMAGENET64_SAMPLE, LabeledImages, named_tensors
from gipip.data.download import cache_folder
from gipip.data.photographs import Photographs, list_folder, near, perceptual_hashes, read
from gipip.errors import DataError
from gipip.files import DATA, read_tensors, write_tensors

SIZE = 64
HASHES = DATA / "hashes-imagenet64.safetensors"
"""Perceptual hashes of the images that the shipped priors for ImageNet at 64 × 64 were
trained on.
"""
_LIMIT = 1_000


def prepare_imagenet(private: Path | str | None = None, auxiliary: Path | str | None = None) -> str:
    """Make a data set of private photographs, once; its name, for `load_dataset` and
    `Scenario`, which says what files it was made of.

    `private`, `auxiliary`: folders in the layout root/class/image, such as
    torchvision's ImageNet and Tiny ImageNet's training images; the label is the rank of
    the class folder's name, as usual for ImageNet's 1,000. Of `private` at most 1,000
    photographs are taken, each class in proportion, a tenth of them for tuning: the
    shorter side is scaled to 72 pixels, then the central 64 × 64 are kept. What shows
    the same photograph as one of `auxiliary` or of the shipped priors' images is left
    out (perceptual hashes, see `gipip.data.photographs`), and how many these were is
    printed.

    Without private photographs this gives the 20 that ship. Raises DataError for
    folders that cannot be used.
    """
    path = IMAGENET64_SAMPLE
    if private:
        photographs = list_folder(Path(private))
        owned = list_folder(Path(auxiliary)) if auxiliary else None
        path = cache_folder() / f"imagenet64-{_identity(photographs, owned)}.safetensors"
        if not path.exists():
            _make(path, photographs, owned)
    name, (_, about) = path.stem.removesuffix("-sample"), read_tensors(path)
    print(
        f"{name}: {about['images']:,} photographs at {SIZE}×{SIZE}; {about['excluded']} were left "
        f"out, because they are among the {about['compared']:,} photographs that the attacker owns."
    )
    return name


def _identity(private: Photographs, auxiliary: Photographs | None) -> str:
    """Eight hex digits for the names and sizes of all files."""
    lines = [str(_LIMIT)]
    for photographs in filter(None, (private, auxiliary)):
        files = zip(photographs.names, photographs.paths, strict=True)
        lines += [*(f"{name} {path.stat().st_size}" for name, path in files), ""]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:8]


def _make(path: Path, private: Photographs, auxiliary: Photographs | None) -> None:
    chosen, pixels = read(private[private.shuffled("limit")[:_LIMIT]], SIZE)
    owned = numpy.unique(shipped_hashes())
    if auxiliary:
        owned = numpy.union1d(owned, perceptual_hashes(auxiliary))
    new = (~near(perceptual_hashes(chosen), owned)).nonzero()[0].tolist()
    rows = [new[row] for row in chosen[new].shuffled("split:0")]
    tuning = round(0.1 * len(rows))
    if not 0 < tuning < len(rows):
        found = f"{private.root} holds {len(rows)} usable photographs"
        raise DataError(f"{found}, too few for a tuning and a private part. Give at least 10.")
    pool = LabeledImages(pixels, torch.tensor(chosen.labels))
    parts = {"tuning": pool[sorted(rows[:tuning])], "private": pool[sorted(rows[tuning:])]}
    left_out = len(chosen.paths) - len(rows)
    about = {"images": len(rows), "excluded": left_out, "compared": len(owned)}
    write_tensors(path, named_tensors(**parts), about)


def shipped_hashes() -> UInt64[numpy.ndarray, "images"]:
    """Perceptual hashes of all images that the shipped priors for ImageNet at 64 × 64
    were trained on.
    """
    tensors, _ = read_tensors(HASHES)
    return tensors["hashes"].numpy().view(numpy.uint64)

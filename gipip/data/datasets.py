"""Data sets and their three disjoint pools: auxiliary (all the attacker owns), tuning
(weights are tuned on it), private (reported).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from gipip.data.download import cache_folder, read_cifar10
from gipip.data.drawing import batches, stratified_rows
from gipip.data.photographs import decode, list_folder, printable, read
from gipip.errors import BatchSizeError, DataError
from gipip.files import DATA, fingerprint, read_tensors

CIFAR10_CLASSES = tuple(
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
)
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
"""Per-channel mean and standard deviation of the 50,000 training images in [0, 1]."""
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PAPER_FRACTION = 0.038
"""The share of the training set that the paper grants the attacker: 1,900 of CIFAR-10's
50,000.
"""

CIFAR10_SAMPLE = DATA / "cifar10-sample.safetensors"
IMAGENET64_SAMPLE = DATA / "imagenet64-sample.safetensors"
_Pixels = (
    UInt8[Tensor, "batch channels height width"] | Float32[Tensor, "batch channels height width"]
)


@dataclass(frozen=True, eq=False)
class LabeledImages:
    """Images with their labels: a batch, or a whole pool.

    `pixels`: uint8 in 0…255 (a quarter of the memory), or float32 in [0, 1]. `labels`:
    class indices. `indices`: each image's place in the set it was drawn from (0, 1, 2,
    … if not given). Raises `DataError` for anything else.
    """

    pixels: _Pixels
    labels: Int64[Tensor, "batch"]
    indices: Int64[Tensor, "batch"] = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        _require(self.pixels, _Pixels, "uint8 or float32 images, (batch, channels, height, width)")
        count = len(self.pixels)
        if self.indices is None:
            object.__setattr__(self, "indices", torch.arange(count))
        for name in ("labels", "indices"):
            expected = f"{name} as an int64 tensor, one for each of {count} images"
            _require(getattr(self, name), Int64[Tensor, f"{count}"], expected)
        if self.pixels.is_floating_point() and not ((self.pixels >= 0) & (self.pixels <= 1)).all():
            raise DataError("Float images lie in [0, 1], without NaN. Divide by 255, or clamp.")

    @property
    def images(self) -> Float32[Tensor, "batch channels height width"]:
        """In [0, 1]. Converted at each access: of a large pool, take a part first."""
        return self.pixels.float() / 255 if self.pixels.dtype == torch.uint8 else self.pixels

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels."""
        return fingerprint({"pixels": self.pixels, "labels": self.labels})

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "LabeledImages":
        return LabeledImages(self.pixels[rows], self.labels[rows], self.indices[rows])

    def shuffled(self, salt: str) -> list[int]:
        """All rows in the order of `salt`; every beginning holds each class in
        proportion.
        """
        return stratified_rows(self.labels.tolist(), self.indices.tolist(), salt)


def _require(value: object, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise DataError(f"Expected {expected}; got {described(value)}.")


def described(value: object) -> str:
    """A tensor by its type and shape, anything else by its class: for messages."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} of shape {tuple(value.shape)}"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint pools of one data set, and the constants that belong to it.

    `mean`, `std`: per-channel normalisation constants of images in [0, 1].
    `training_images`: size of the whole set that an auxiliary fraction refers to; the
    auxiliary pool may hold fewer. `default_fraction`: of `auxiliary()`.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    auxiliary_pool: LabeledImages = field(repr=False)
    tuning_pool: LabeledImages = field(repr=False)
    private_pool: LabeledImages = field(repr=False)
    training_images: int
    default_fraction: float = 1.0

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.private_pool.pixels.shape[-1]

    def restricted(self, classes: Sequence[int]) -> "Dataset":
        """With private and tuning images of these classes only; labels keep their numbers."""
        wanted = torch.tensor(classes, dtype=torch.int64)
        pools = (self.tuning_pool, self.private_pool)
        tuning, private = (pool[torch.isin(pool.labels, wanted)] for pool in pools)
        return replace(self, tuning_pool=tuning, private_pool=private)

    def auxiliary(self, fraction: float | None = None, seed: int = 0) -> LabeledImages:
        """All that the attacker owns: `fraction` in (0, 1] of the whole training set,
        each class in proportion.

        The default is 0.038 for CIFAR-10, as in the paper, and everything for a folder.
        For one seed a smaller fraction is the beginning of a larger one. Raises
        `DataError` if the fraction selects no image, or more than the pool holds.
        """
        require_whole("seed", seed)
        pool, whole = self.auxiliary_pool, self.training_images
        fraction = self.default_fraction if fraction is None else fraction
        wanted = round(fraction * whole) if 0 < fraction <= 1 else 0
        if not 1 <= wanted <= len(pool):
            raise DataError(
                f"fraction={fraction} of {whole:,} images: expected some of the {len(pool):,} "
                f"auxiliary ones that {self.name} has here. For more, run `gipip data cifar10` and "
                "use load_dataset('cifar10', full=True), or load_dataset('folder', root=…)."
            )
        return pool[pool.shuffled(f"auxiliary:{seed}")[:wanted]]

    def private(
        self, batch_size: int = 1, seed: int = 0, distinct_labels: bool = True
    ) -> LabeledImages:
        """The batch a client holds: ground truth, for the client and the metrics only.

        Seeds 0, 1, 2, … give disjoint batches until the pool is used up; then a
        reshuffled pass begins. With `distinct_labels` no class occurs twice in a batch.
        Raises `BatchSizeError` if no such batch exists.
        """
        return _batch(self.private_pool, batch_size, seed, distinct_labels, "private")

    def tuning(
        self, batch_size: int = 1, seed: int = 0, distinct_labels: bool = True
    ) -> LabeledImages:
        """As `private`, from the images on which an attack's weights are tuned: never
        reported.
        """
        return _batch(self.tuning_pool, batch_size, seed, distinct_labels, "tuning")


def _batch(
    pool: LabeledImages, size: int, seed: int, distinct_labels: bool, purpose: str
) -> LabeledImages:
    possible = len(pool.labels.unique()) if distinct_labels else len(pool)
    if not isinstance(size, int | numpy.integer) or not 1 <= size <= possible:
        wanted = f"{size} {purpose} images: expected a whole number from 1 to {possible:,}"
        more = f", with distinct_labels=False to {len(pool):,}" if distinct_labels else ""
        raise BatchSizeError(f"{wanted}{more}.")
    require_whole("seed", seed)
    one_pass = partial(batches, pool.labels.tolist(), pool.indices.tolist(), size, distinct_labels)
    number, place = divmod(seed, len(one_pass(f"{purpose}:0")))
    return pool[one_pass(f"{purpose}:{number}")[place]]


def require_whole(name: str, value: Any, least: int = 0) -> None:
    """Raise DataError unless `value` is a whole number from `least` to 2⁶³ − 1."""
    if not isinstance(value, int | numpy.integer) or not least <= value < 2**63:
        raise DataError(f"{name}={value!r}: expected a whole number from {least} to 2⁶³ − 1.")


def load_dataset(
    name: str, *, root: Path | str | None = None, size: int | None = None, full: bool = False
) -> Dataset:
    """A data set by name.

    "cifar10": the embedded sample, offline (1,900 auxiliary, 200 tuning, 256 private
    images of 32 × 32); with `full=True` all 60,000, after `gipip data cifar10`.
    "imagenet64": 20 embedded ImageNet photographs at 64 × 64 (4 tuning, 16 private;
    1,000 classes, no auxiliary images); "imagenet64-…": yours, under the name that
    `gipip.prepare_imagenet` gave. "folder": any folder in the layout root/class/image,
    at size × size pixels (64 if not given): the shorter side is scaled to 9/8 of it,
    then the centre is cropped. A tenth of its images is for tuning, half is auxiliary,
    the rest private. Copies of an image, and hidden files, are left out. Raises
    `DataError` for an unknown name, unsuitable options or missing images.
    """
    embedded = root is None and size is None
    if name == "folder" and root is not None and not full:
        return _folder(Path(root), 64 if size is None else size)
    if name == "cifar10" and embedded:
        return _cifar10(full)
    if name.startswith("imagenet64") and embedded and not full:
        return _imagenet64(name)
    raise DataError(
        f"There is no data set {name!r} with these options. Known: 'cifar10' (full), 'imagenet64', "
        "'folder' (root, size)."
    )


def load_images(paths: Sequence[Path | str], size: int = 32) -> LabeledImages:
    """Pictures of your own as one client's batch, labelled 0, 1, 2, …: cropped to
    squares and scaled to size × size pixels.

    Raises `DataError` for a file that is missing or not an image, and for none.
    """
    if not paths:
        raise DataError("There are no pictures: give the path of at least one.")
    require_whole("size", size, least=1)
    pixels = torch.stack([decode(Path(path), size, size) for path in paths])
    return LabeledImages(pixels, torch.arange(len(pixels)))


def named_tensors(**pools: LabeledImages) -> dict[str, Tensor]:
    """What a file of these pools holds: tensors POOL_images, POOL_labels and
    POOL_indices.
    """
    tensors = {}
    for name, pool in pools.items():
        tensors[f"{name}_images"] = pool.pixels
        tensors[f"{name}_labels"] = pool.labels
        tensors[f"{name}_indices"] = pool.indices
    return tensors


def _pools(path: Path, *names: str) -> list[LabeledImages]:
    """These pools, in a file of `named_tensors`."""
    tensors, _ = read_tensors(path)
    parts = ("images", "labels", "indices")
    return [LabeledImages(*(tensors[f"{name}_{part}"] for part in parts)) for name in names]


def _cifar10(full: bool) -> Dataset:
    names = ("auxiliary", "tuning", "private")
    auxiliary, tuning, private = _cifar10_full() if full else _pools(CIFAR10_SAMPLE, *names)
    constants = (CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD)
    return Dataset("cifar10", *constants, auxiliary, tuning, private, 50_000, PAPER_FRACTION)


def _cifar10_full() -> list[LabeledImages]:
    images, labels = read_cifar10()
    auxiliary = LabeledImages(images[:-10_000], labels[:-10_000])
    test = LabeledImages(images[-10_000:], labels[-10_000:])
    rows = test.shuffled("tuning:0")
    return [auxiliary, test[rows[:200]], test[sorted(rows[200:])]]


def _imagenet64(name: str) -> Dataset:
    from torchvision.models import ResNet18_Weights  # takes a second to import

    path = IMAGENET64_SAMPLE if name == "imagenet64" else cache_folder() / f"{name}.safetensors"
    if not path.exists():
        advice = "Make it with `gipip data imagenet64 --private …`, or use 'imagenet64', a sample."
        raise DataError(f"{path} is missing. {advice}")
    tuning, private = _pools(path, "tuning", "private")
    classes = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    return Dataset(name, classes, IMAGENET_MEAN, IMAGENET_STD, private[[]], tuning, private, 0)


def _folder(root: Path, size: int) -> Dataset:
    """The folder root/class/image; the class index is the rank of the sub-folder's
    name. No image is in two pools, not even as a copy.
    """
    require_whole("size", size, least=1)
    photographs, pixels = read(list_folder(root), size)
    pool = LabeledImages(pixels, torch.tensor(photographs.labels))
    rows = photographs.shuffled("split:0")
    first = round(0.1 * len(rows))
    second = first + round(0.5 * len(rows))
    parts = (rows[first:second], rows[:first], rows[second:])
    auxiliary, tuning, private = (pool[sorted(part)] for part in parts)
    constants = (photographs.classes, IMAGENET_MEAN, IMAGENET_STD)
    name = printable(root.resolve().name)
    return Dataset(name, *constants, auxiliary, tuning, private, len(auxiliary))

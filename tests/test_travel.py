"""What travels to a machine without a network, and what comes home."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from gipip import travel
from gipip.errors import DataError, ProfileError
from gipip.files import read_tensors, write_tensors
from gipip.travel import collect, pack

KEYS = [letter * 32 for letter in "abc"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(store, *places, value=1.0, steps=5):
    for place in places:
        write_tensors(store / place, {"x": torch.full((3,), value)}, {"steps": steps})
    return store


def content(store):
    return {
        path.relative_to(store).as_posix(): read_tensors(path)[0]["x"][0].item()
        for path in store.rglob("*.safetensors")
    }


def unpack(archives, folder):
    folder.mkdir()
    for archive in archives:
        subprocess.run(["tar", "-xf", archive], cwd=folder, check=True)
    return folder


# Packing -----------------------------------------------------------------------


def test_a_packed_run_goes_on_elsewhere_from_what_travelled_and_its_results_come_home(
    tmp_path, cache
):
    fill(
        cache, "imagenet64-mine.safetensors", "imagenet64-other.safetensors", "cifar10.safetensors"
    )
    store = fill(
        tmp_path / "store", f"{KEYS[0]}.safetensors", f"unfinished/{KEYS[1]}-0.safetensors"
    )
    archives = pack(
        tmp_path / "packed",
        "smoke",
        ["00"],
        photographs="imagenet64-mine",
        store=store,
        limit=8 * 2**20,
    )
    assert len(archives) > 3 and all(archive.stat().st_size <= 8 * 2**20 for archive in archives)
    there = unpack(archives, tmp_path / "there")
    assert content(there / "results") == content(store)
    assert [path.name for path in (there / "cache").iterdir()] == ["imagenet64-mine.safetensors"]
    fill(there / "results", f"{KEYS[2]}.safetensors")

    python = tmp_path / "python"  # instead of an hour's work: tells what it was asked to do
    python.write_text('#!/bin/sh\necho "$PYTHONPATH $GIPIP_CACHE $@"\nexit 75\n')
    python.chmod(0o755)
    process = subprocess.run(
        ["sh", "run.sh", "5m"],
        cwd=there,
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 75
    command = "-m gipip reproduce --profile smoke --only 00 --private cache/imagenet64-mine.safetensors --budget 5m"
    assert process.stdout == f"{there}:{there}/site {there}/cache {command}\n"
    assert not list(there.rglob("*.part-*"))
    for name in (
        "data/lpips-alexnet-trunk.safetensors",
        "gipip/__main__.py",
        "notebooks/profiles.yaml",
        "pyproject.toml",
    ):
        assert (there / name).read_bytes() == (travel._ROOT / name).read_bytes()

    home = tmp_path / "home"
    assert sorted(collect([there / "results.tar"], home).new) == sorted(content(home)) and content(
        home
    ) == content(there / "results")


def test_the_unpacked_code_runs_as_it_is_with_nothing_installed(tmp_path):
    there = unpack(pack(tmp_path / "packed", "smoke"), tmp_path / "there")
    code = "import gipip; print(gipip.__file__); gipip.load_dataset('cifar10')"
    environment = os.environ | {"PYTHONPATH": str(there)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == str(there / "gipip" / "__init__.py")


def test_files_larger_than_an_archive_travel_in_parts(tmp_path):
    (tmp_path / "large").write_bytes(os.urandom(3_000_000))
    (tmp_path / "empty").touch()
    (tmp_path / "packed").mkdir()
    archives = travel._write(
        tmp_path / "packed", {"a/large": tmp_path / "large", "empty": tmp_path / "empty"}, 2**20
    )
    assert len(archives) == 3 and max(archive.stat().st_size for archive in archives) <= 2**20
    there = unpack(archives, tmp_path / "there")
    assert (
        b"".join(path.read_bytes() for path in sorted((there / "a").iterdir()))
        == (tmp_path / "large").read_bytes()
    )
    assert (there / "empty").read_bytes() == b""


def test_wheels_are_for_the_other_machine(tmp_path, monkeypatch):
    asked = []

    def download(command, **options):
        if "pip" not in command:
            return git(command, **options)
        asked.extend(command[3:])
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "lpips-1-py3-none-any.whl").touch()
        return subprocess.CompletedProcess(command, 0)

    git = subprocess.run
    monkeypatch.setattr(subprocess, "run", download)
    options = {"python": "3.12", "platforms": ["manylinux2014_x86_64", "manylinux_2_28_x86_64"]}
    archives = pack(tmp_path / "packed", "smoke", wheels=["lpips"], **options)
    assert " ".join(asked[:9]).startswith(
        "download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64"
    )
    assert (unpack(archives, tmp_path / "there") / "wheels" / "lpips-1-py3-none-any.whl").exists()


def test_what_cannot_be_packed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "gipip-009.tar").touch()
    with pytest.raises(DataError, match="full is not empty"):
        pack(tmp_path / "full", "smoke")
    with pytest.raises(ProfileError, match="Unknown profile: 'gpu'"):
        pack(tmp_path / "packed", "gpu")
    with pytest.raises(DataError, match="at least 1 MiB"):
        pack(tmp_path / "packed", "smoke", limit=10**6)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        DataError, match=r"pip cannot download nothing-like-it \(.*No matching distribution"
    ):
        pack(tmp_path / "packed", "smoke", wheels=["nothing-like-it"])


# Collecting --------------------------------------------------------------------


def test_collecting_adds_what_is_new_never_overwrites_and_leaves_what_is_damaged(tmp_path):
    there = fill(
        tmp_path / "there",
        *(f"{key}.safetensors" for key in KEYS),
        "clients/d.safetensors",
        "priors/e.safetensors",
        value=2.0,
    )
    damaged = there / f"{KEYS[2]}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    home = fill(tmp_path / "home", f"{KEYS[0]}.safetensors")
    new = [f"{KEYS[1]}.safetensors", "clients/d.safetensors", "priors/e.safetensors"]
    found = collect([there], home)
    assert (found.new, found.known, found.damaged) == (
        new,
        [f"{KEYS[0]}.safetensors"],
        [damaged.name],
    )
    assert content(home) == {f"{KEYS[0]}.safetensors": 1.0} | dict.fromkeys(new, 2.0)
    assert collect([there], home).new == []


@pytest.mark.parametrize(("here", "there", "kept"), [(5, 9, 9), (9, 5, 9), (5, 5, 5)])
def test_of_an_attack_under_way_the_part_that_came_further_is_kept(here, there, kept, tmp_path):
    place = f"unfinished/{KEYS[0]}-0.safetensors"
    home, other = (
        fill(tmp_path / name, place, steps=steps)
        for name, steps in (("home", here), ("other", there))
    )
    found = collect([other], home)
    assert read_tensors(home / place)[1]["steps"] == kept and len(found.new) == (there > here)


def test_an_attack_that_is_finished_is_no_longer_under_way(tmp_path):
    result, part = f"{KEYS[0]}.safetensors", f"unfinished/{KEYS[0]}-0.safetensors"
    begun, done, home = (
        fill(tmp_path / "begun", part),
        fill(tmp_path / "done", result),
        fill(tmp_path / "home", part, steps=1),
    )
    assert collect([done], home).new == [result] and list(content(home)) == [result]
    assert collect([begun], home).known == [part] and list(content(home)) == [result]


def suspicious(name="results/link", **about):
    member = tarfile.TarInfo(name)
    for field, value in about.items():
        setattr(member, field, value)
    return member


@pytest.mark.parametrize(
    "member",
    [
        *(
            suspicious(name)
            for name in (
                "../evil.safetensors",
                "/tmp/evil.safetensors",
                "results/../../evil.safetensors",
            )
        ),
        *(
            suspicious(type=kind, linkname="/etc")
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)
        ),
    ],
)
def test_an_archive_with_links_or_paths_that_lead_out_of_it_is_refused_as_a_whole(member, tmp_path):
    fill(tmp_path / "results", f"{KEYS[0]}.safetensors")
    with tarfile.open(tmp_path / "results.tar", "w") as archive:
        archive.add(tmp_path / "results", "results")
        archive.addfile(member)
    with pytest.raises(
        DataError, match=f"holds {re.escape(repr(member.name))}, a link or a path that leads out"
    ):
        collect([tmp_path / "results.tar"], tmp_path / "home")
    assert not (tmp_path / "home").exists() and not list(tmp_path.glob("evil*"))


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no archive")
    for name in ("notes.txt", "nowhere.tar"):
        with pytest.raises(DataError, match=f"{name} is neither a folder nor a readable archive"):
            collect([tmp_path / name], tmp_path / "home")

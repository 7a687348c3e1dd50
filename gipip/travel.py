"""Runs on machines without a network: all that one needs in archives small enough to
upload, and its results brought home.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gipip.attacks.checkpoints import Checkpoint
from gipip.data.download import cache_folder
from gipip.errors import DamagedFileError, DataError
from gipip.files import read_metadata, read_tensors
from gipip.reproduce import plan

_ROOT = Path(__file__).parent.parent
_CODE = ("gipip", "notebooks", "data", "pyproject.toml", "README.md", "Makefile", "LICENSE")
_FOLDERS = ("clients", "priors", "unfinished")  # of a store, beside the results themselves
_HEADER, _END = 4096, 10_240  # bytes that tar adds to a member and to an archive, at most
_NO_CODE = {"__pycache__", ".ipynb_checkpoints"}

# Joins files that were too large for one archive, unpacks wheels, runs, and packs what
# there is then, finished or not.
_SCRIPT = """#!/bin/sh
# sh run.sh [TIME]: runs until TIME is over (9m if not given) and writes results.tar.
# Exit code 75: there is more to do, run it again.
cd "$(dirname "$0")" || exit 1
python=${{PYTHON:-python3}}
find . -name '*.part-000' | while read -r first; do
    whole=${{first%.part-000}}
    cat "$whole".part-* > "$whole" && rm "$whole".part-*
done
for wheel in wheels/*.whl; do
    if [ -e "$wheel" ]; then "$python" -m zipfile -e "$wheel" site || exit 1; fi
done
PYTHONPATH="$PWD:$PWD/site" GIPIP_CACHE="$PWD/cache" "$python" -m gipip reproduce {options} --budget "${{1:-9m}}"
code=$?
if [ -d results ]; then tar -cf results.tar results; fi
exit $code
"""


class Collected(NamedTuple):
    """The names of files that a store received, of those it had already, and of damaged
    ones, which it did not take.
    """

    new: list[str]
    known: list[str]
    damaged: list[str]


def pack(
    folder: Path | str,
    profile: str,
    only: Iterable[str] = (),
    *,
    photographs: str | None = None,
    wheels: Sequence[str] = (),
    python: str | None = None,
    platforms: Sequence[str] = (),
    store: Path | str | None = None,
    limit: int = 60 * 2**20,
) -> list[Path]:
    """Write archives of at most `limit` bytes into a new folder: unpacked in one place,
    `sh run.sh` runs the notebooks `only` there.

    They hold the code, data and notebooks of this checkout, trained clients in the
    cache folder, private `photographs` (a data set of `gipip.prepare_imagenet`, by its
    name), what is in the `store`, and `wheels`: packages, by name, that the other
    machine lacks, for its `python` ("3.12") and `platforms` ("manylinux_2_28_x86_64"),
    by default this machine's. Raises ProfileError for an unknown profile or notebook,
    DataError for a folder with files in it, a wheel that cannot be had, or a limit
    below 1 MiB.
    """
    folder, only = Path(folder), list(only)
    plan(profile, only)
    if limit < 2**20:
        raise DataError(f"Archives of at most {limit} bytes are too small. Give at least 1 MiB.")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(
            f"{folder} is not empty. Give a new folder, so that no archive of another time is uploaded."
        )
    options = ["--profile", profile, *(word for name in only for word in ("--only", name))]
    options += ["--private", f"cache/{photographs}.safetensors"] if photographs else []
    cached = [
        *cache_folder().glob("client-*.safetensors"),
        *([cache_folder() / f"{photographs}.safetensors"] if photographs else []),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "run.sh"
        script.write_text(_SCRIPT.format(options=shlex.join(options)))
        files = {"run.sh": script, **_code(), **{f"cache/{path.name}": path for path in cached}}
        files |= {
            f"wheels/{path.name}": path
            for path in _download(wheels, python, platforms, Path(scratch) / "wheels")
        }
        files |= (
            {f"results/{place}": path for place, path in _stored(Path(store)).items()}
            if store
            else {}
        )
        return _write(folder, files, limit)


def _code() -> dict[str, Path]:
    """The files of the checkout that a run needs, by their path in it: those that git
    does not ignore, or without git all.
    """
    try:
        command = [
            "git",
            "-C",
            str(_ROOT),
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
            "--",
            *_CODE,
        ]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\0"
        )
        paths = {_ROOT / name for name in names if name}
    except (OSError, subprocess.CalledProcessError):
        paths = {
            path
            for name in _CODE
            for path in (_ROOT / name, *(_ROOT / name).rglob("*"))
            if not _NO_CODE & set(path.parts)
        }
    return {path.relative_to(_ROOT).as_posix(): path for path in sorted(paths) if path.is_file()}


def _download(
    wheels: Sequence[str], python: str | None, platforms: Sequence[str], folder: Path
) -> list[Path]:
    if not wheels:
        return []
    target = [
        *(["--python-version", python] if python else []),
        *(word for name in platforms for word in ("--platform", name)),
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        *target,
        "--dest",
        str(folder),
        *wheels,
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        problem = process.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        raise DataError(
            f"pip cannot download {', '.join(wheels)} ({problem[0]}). Check the names, --python and --platform."
        )
    return sorted(folder.glob("*.whl"))


def _stored(store: Path) -> dict[str, Path]:
    """The files of a store: results, trained clients and priors, attacks under way; by
    their place in it.
    """
    files = [path for name in ("", *_FOLDERS) for path in (store / name).glob("*.safetensors")]
    return {path.relative_to(store).as_posix(): path for path in sorted(files)}


def _write(folder: Path, files: dict[str, Path], limit: int) -> list[Path]:
    """Archives gipip-001.tar, … that hold the files, too large ones in parts, one after
    another.
    """
    archives, room = [], 0
    with contextlib.ExitStack() as under_way:
        for name, path in files.items():
            for part, start, size in _parts(name, path.stat().st_size, limit - _END - _HEADER):
                if size + _HEADER > room:
                    under_way.close()
                    archives.append(folder / f"gipip-{len(archives) + 1:03d}.tar")
                    archive = under_way.enter_context(tarfile.open(archives[-1], "w"))
                    room = limit - _END
                room -= size + _HEADER
                with path.open("rb") as file:
                    member = archive.gettarinfo(path, part)
                    member.size, member.uid, member.gid, member.uname, member.gname = (
                        size,
                        0,
                        0,
                        "",
                        "",
                    )
                    file.seek(start)
                    archive.addfile(member, file)
    return archives


def _parts(name: str, size: int, most: int) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of each part of a file; of a file of at most `most` bytes
    there is one, named as it is.
    """
    starts = range(0, max(size, 1), most)
    for number, start in enumerate(starts):
        yield (
            (f"{name}.part-{number:03d}" if len(starts) > 1 else name),
            start,
            min(most, size - start),
        )


def collect(sources: Iterable[Path | str], store: Path | str) -> Collected:
    """Bring what stores of other machines hold into this one, from folders or from
    archives that run.sh wrote there.

    Every file is verified; a damaged one is not taken. No result is ever overwritten;
    an attack under way is by one that came further. Raises DataError for a source that
    is neither a folder nor an archive, and for an archive with links or with paths that
    lead out of it.
    """
    found = Collected([], [], [])
    for source in map(Path, sources):
        if source.is_dir():
            _collect_folder(
                source / "results" if (source / "results").is_dir() else source, Path(store), found
            )
            continue
        with tempfile.TemporaryDirectory() as scratch:
            _unpack(source, Path(scratch))
            _collect_folder(Path(scratch) / "results", Path(store), found)
    return found


def _unpack(source: Path, folder: Path) -> None:
    """Write an archive's files below the folder, or nothing if one of them is suspicious."""
    try:
        with tarfile.open(source) as archive:
            members = archive.getmembers()
            for member in members:
                path = PurePosixPath(member.name)
                if (
                    not (member.isfile() or member.isdir())
                    or path.is_absolute()
                    or ".." in path.parts
                ):
                    raise DataError(
                        f"{source} holds {member.name!r}, a link or a path that leads out of it. Take only archives by run.sh."
                    )
            for member in members:
                if member.isfile():
                    (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
                    with (
                        archive.extractfile(member) as content,
                        (folder / member.name).open("wb") as file,
                    ):
                        shutil.copyfileobj(content, file)
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{source} is neither a folder nor a readable archive ({error}). Give a store's folder or results.tar."
        ) from error


def _collect_folder(folder: Path, store: Path, found: Collected) -> None:
    for place, path in _stored(folder).items():
        try:
            read_tensors(path)
        except DamagedFileError:
            found.damaged.append(place)
            continue
        if not _is_news(place, path, store):
            found.known.append(place)
            continue
        found.new.append(place)
        target = store / place
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(path, draft)
        os.replace(draft, target)
        if target.parent == store:
            Checkpoint(store / "unfinished" / target.stem).remove()


def _is_news(place: str, path: Path, store: Path) -> bool:
    """Whether the store lacks the file; an attack under way, also if the store has a
    shorter part of it and not its result.
    """
    if not place.startswith("unfinished/"):
        return not (store / place).exists()
    result = store / f"{path.stem.split('-')[0]}.safetensors"
    return not result.exists() and _steps(path) > _steps(store / place)


def _steps(checkpoint: Path) -> int:
    try:
        return read_metadata(checkpoint)["steps"]
    except DamagedFileError:
        return 0

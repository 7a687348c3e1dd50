"""Runs the notebooks in one of the profiles of `notebooks/profiles.yaml`, and believes
only what really ran.

A second run is fast because every result is in the result store, not because a notebook
is skipped.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import nbformat
import papermill
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from gipip.errors import GipipError, OutOfTime, ProfileError
from gipip.experiments.claims import collect_claims, write_readme_section
from gipip.progress import require_time, time_limit

_PACKAGE = Path(__file__).parent
# Without it ipykernel warns, in every notebook, that its sockets are not encrypted.
_KERNEL = Config({"KernelManager": {"transport_encryption": "auto"}})
_RESERVE = 20  # seconds of a budget: imports before it counts, attacks that end their iteration, workers that end, the last figures


class NotebookError(GipipError):
    """A notebook did not run to its end; its copy, as far as it came, is kept."""


class Executed(NamedTuple):
    """A notebook that ran: its executed copy, the seconds it took, and the figures it
    wrote (.png).
    """

    name: str
    copy: Path
    seconds: float
    figures: tuple[Path, ...]


def notebooks_folder() -> Path:
    """The notebooks of this checkout; for a gipip that was installed as a package, a
    copy in ./notebooks, made on first use.
    """
    if not (_PACKAGE / "_notebooks").is_dir():
        return _PACKAGE.parent / "notebooks"
    if not Path("notebooks").is_dir():
        shutil.copytree(
            _PACKAGE / "_notebooks", "notebooks", ignore=shutil.ignore_patterns("__pycache__")
        )
    return Path("notebooks").resolve()


def run(
    profile: str,
    only: Iterable[str] = (),
    *,
    in_place: bool = False,
    output: Path | str | None = None,
    folder: Path | str | None = None,
    parameters: Mapping[str, str] | None = None,
    budget: float | None = None,
    report: Callable[[str], None] = print,
) -> list[Executed]:
    """Run the notebooks of `folder` in order, each in a kernel of its own whose working
    directory is that folder.

    `only`: numbers ("02") or names ("02_inversion") of those to run; all by default.
    Executed copies go to `output`, by default results/notebooks/PROFILE beside the
    folder. `in_place` executes the notebooks themselves, unchanged but for their
    outputs, so that two executions give the same bytes. `parameters` go to every
    notebook that declares them, whatever the profile says. `budget`: seconds after
    which attacks pause and OutOfTime says what is left; the same call goes on from
    there. In the end the claims that notebooks judged are joined in claims.csv.
    `report` receives a line for each step. Raises `ProfileError` before anything runs
    for an unknown profile, notebook or parameter, and `NotebookError` at the first
    notebook that fails.
    """
    if budget is not None and budget <= _RESERVE:
        raise ProfileError(
            f"A budget of {budget:g} s is too short: {_RESERVE} s of it go into starting and ending. Give some minutes."
        )
    limit = time_limit() if budget is None else time.time() + budget - _RESERVE
    folder = Path(folder or notebooks_folder()).resolve()
    settings = plan(profile, only, folder, parameters)
    if not settings:
        raise ProfileError(
            f"{folder} holds no notebooks. Expected NUMBER_NAME.ipynb, such as 00_quickstart.ipynb."
        )
    if in_place and any(settings.values()):
        raise ProfileError(
            f"Notebooks are stored as they are, in the smoke profile; {profile!r} sets parameters. Leave --in-place out."
        )
    target = (
        folder
        if in_place
        else Path(output or folder.parent / "results" / "notebooks" / profile).resolve()
    )
    target.mkdir(parents=True, exist_ok=True)
    finished = []
    for name, values in settings.items():
        report(f"{name}: running, profile {profile}")
        started, clock = time.time_ns(), time.perf_counter()
        try:
            require_time(limit)
            _execute(
                folder / f"{name}.ipynb",
                target / f"{name}.ipynb",
                None if in_place else values,
                limit,
            )
        except OutOfTime as pause:
            done, left = list(settings)[: len(finished)], list(settings)[len(finished) :]
            summary = f"Notebooks done: {', '.join(done) or 'none'}; left: {', '.join(left)}. The same command goes on from here."
            raise OutOfTime(f"{name} is not finished. {pause}\n{summary}") from pause
        figures = [
            path
            for path in sorted((folder.parent / "figures").rglob("*.png"))
            if path.stat().st_mtime_ns >= started
        ]
        finished.append(
            Executed(name, target / f"{name}.ipynb", time.perf_counter() - clock, tuple(figures))
        )
        report(f"{name}: done in {finished[-1].seconds:.0f} s")
    _join_claims(profile, settings, folder, report)
    return finished


def _join_claims(
    profile: str, settings: dict[str, dict], folder: Path, report: Callable[[str], None]
) -> None:
    """claims.csv in the folder to which the profile sends figures, if it names one; the
    profile cpu also shows it in README.md.
    """
    for figures in sorted(
        {folder / values["figures"] for values in settings.values() if "figures" in values}
    ):
        table = collect_claims(figures)
        if len(table):
            counts = ", ".join(
                f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items()
            )
            report(f"Claims: {counts}: {(figures / 'claims.csv').resolve()}")
            readme = folder.parent / "README.md"
            if profile == "cpu" and write_readme_section(readme, table):
                report(f"Claims, judged: {readme}")


def plan(
    profile: str,
    only: Iterable[str] = (),
    folder: Path | str | None = None,
    parameters: Mapping[str, str] | None = None,
) -> dict[str, dict]:
    """The parameters of each chosen notebook, in order: those under "all" that it
    declares, its own, the given ones that it declares.

    The whole profile is checked: raises `ProfileError` for a notebook or parameter that
    does not exist.
    """
    folder = Path(folder or notebooks_folder())
    profiles = read_profiles(folder)
    _require("profile", profile, profiles)
    settings = {name: values or {} for name, values in (profiles[profile] or {}).items()}
    shared, given = settings.pop("all", {}), parameters or {}
    names = [
        path.stem
        for path in sorted(folder.glob("[0-9]*.ipynb"))
        if not path.stem.endswith(".failed")
    ]
    declared = {
        name: set(papermill.inspect_notebook(str(folder / f"{name}.ipynb"))) for name in names
    }
    for name in settings:
        _require("notebook", name, names)
        for parameter in settings[name]:
            _require(f"parameter of {name}", parameter, declared[name])
    for parameter in [*shared, *given]:
        _require("parameter of any notebook", parameter, set().union(*declared.values()))
    chosen = {_named(wanted, names) for wanted in only} or set(names)
    own = {name: shared | settings.get(name, {}) | given for name in names}
    return {
        name: {key: value for key, value in own[name].items() if key in declared[name]}
        for name in names
        if name in chosen
    }


def read_profiles(folder: Path) -> dict[str, dict | None]:
    """The profiles of `folder`/profiles.yaml, by name: {"all" or a notebook's name:
    {parameter: value}}.
    """
    path = folder / "profiles.yaml"
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["profiles"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ProfileError(
            f"{path} cannot be read ({error}). Expected YAML: profiles: {{smoke: {{}}, cpu: {{…}}}}."
        ) from error


def _require(what: str, wanted: str, known: Collection[str]) -> None:
    if wanted not in known:
        raise ProfileError(
            f"Unknown {what}: {wanted!r}. Known: {', '.join(sorted(known)) or 'none'}."
        )


def _named(wanted: str, names: list[str]) -> str:
    """The notebook of that name or number; "2" is "02"."""
    numbers = {name.split("_")[0].lstrip("0"): name for name in names}
    name = numbers.get(wanted.lstrip("0"), wanted)
    _require("notebook", name, names)
    return name


@contextlib.contextmanager
def _environment(limit: float) -> Iterator[None]:
    """What kernels inherit: plain progress lines, the time limit, and no JUPYTER_PATH,
    which would outrank this environment's kernel.
    """
    before = dict(os.environ)
    os.environ["GIPIP_DEADLINE"] = str(limit)
    os.environ["GIPIP_HEADLESS"] = "1"
    os.environ.pop("JUPYTER_PATH", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _execute(source: Path, target: Path, parameters: dict | None, limit: float) -> None:
    """Execute as NAME.failed.ipynb and rename once every cell is known to have run;
    `parameters` None means in place.

    Raises OutOfTime, and leaves no copy, when a cell had to stop at the `limit`.
    """
    draft = target.with_suffix(".failed.ipynb")
    problem = None
    try:
        with _environment(limit):
            _normalised(source, draft) if parameters is None else _with_parameters(
                source, draft, parameters
            )
    except (PapermillExecutionError, CellExecutionError, DeadKernelError) as error:
        problem = f"{error}."
    notebook = nbformat.read(draft, as_version=4)
    if pause := _out_of_time(notebook):
        draft.unlink()
        raise OutOfTime(pause)
    problem = unfinished(notebook) or problem
    if problem:
        raise NotebookError(
            f"{source.stem} failed: {problem} The notebook as far as it ran: {draft}"
        )
    os.replace(draft, target)


def _with_parameters(source: Path, target: Path, parameters: dict) -> None:
    papermill.execute_notebook(
        str(source),
        str(target),
        parameters,
        cwd=str(source.parent),
        progress_bar=False,
        kernel_name="python3",
        stdout_file=sys.stdout,
        stderr_file=sys.stderr,
        config=_KERNEL,
    )


def _normalised(source: Path, target: Path) -> None:
    """Execute and keep neither timings, progress, widget state, random cell ids nor
    versions.
    """
    notebook = nbformat.read(source, as_version=4)
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:02d}"
        if cell.cell_type == "code":
            cell.update(
                outputs=[], execution_count=None
            )  # nothing of an earlier execution may pass for one of this
    options = {
        "record_timing": False,
        "coalesce_streams": True,
        "kernel_name": "python3",
        "timeout": None,
        "config": _KERNEL,
    }
    client = NotebookClient(
        notebook, resources={"metadata": {"path": str(source.parent)}}, **options
    )
    try:
        with client.setup_kernel():  # client.execute() would answer Ctrl-C with an AssertionError
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
    finally:
        for cell in notebook.cells:  # progress goes to stderr, and tells how long things took
            cell.update(
                {"outputs": [output for output in cell.outputs if output.get("name") != "stderr"]}
                if "outputs" in cell
                else {}
            )
        notebook.metadata["language_info"] = {"name": "python"}
        notebook.metadata.pop("widgets", None)
        nbformat.write(notebook, target)


def _out_of_time(notebook: nbformat.NotebookNode) -> str | None:
    """The message of the cell that raised OutOfTime, if one did."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return next(
        (
            output.evalue
            for output in outputs
            if output.output_type == "error" and output.ename == OutOfTime.__name__
        ),
        None,
    )


def unfinished(notebook: nbformat.NotebookNode) -> str | None:
    """What shows that a notebook did not run to its end; None if every code cell ran,
    in order and without an error.

    An output file alone is no proof: a kernel that dies, or `sys.exit(0)` in a cell,
    leaves one too.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for position, cell in enumerate(cells, start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                return f"code cell {position} raised {output.ename}: {output.evalue}."
        if cell.execution_count != position:
            return f"code cell {position} of {len(cells)} did not finish: the kernel died or was told to exit."
    return None

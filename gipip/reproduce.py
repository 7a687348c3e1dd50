"""Runs the notebooks in one of the profiles of `notebooks/profiles.yaml`, and believes
only what really ran.

A second run is fast because every result is in the result store, not because a notebook is skipped.
"""

import base64
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from unittest.mock import patch

from PIL import Image

from gipip.errors import GipipError, OutOfTime, ProfileError
from gipip.progress import require_time, time_limit

try:
    import nbformat
    import papermill
    import yaml
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config
except ImportError as error:
    advice = 'pip install "gipip[notebooks]"'
    raise ProfileError(f"Notebooks need more packages ({error}): {advice}.") from error

_PACKAGE = Path(__file__).parent
_PACKED = _PACKAGE / "_notebooks"
_NOTEBOOK = (
    "notebook of the package (all are in its repository)" if _PACKED.is_dir() else "notebook"
)
# Without it ipykernel warns, in every notebook, that its sockets are not encrypted.
_KERNEL = Config({"KernelManager": {"transport_encryption": "auto"}})
_KERNEL.NotebookClient.coalesce_streams = True  # what a cell prints, in one piece
_RESERVE = 20  # seconds of a budget that go into starting and ending


class NotebookError(GipipError):
    """A notebook did not run to its end; its copy, as far as it came, is kept."""


def notebooks_folder() -> Path:
    """The notebooks of this checkout; of an installed package a copy in ./notebooks, made once.

    The package holds the quickstart alone; the study's notebooks need weights of the repository.
    """
    if not _PACKED.is_dir():
        return _PACKAGE.parent / "notebooks"
    if not Path("notebooks").is_dir():
        shutil.copytree(_PACKED, "notebooks")
    return Path("notebooks").resolve()


def run(
    profile: str,
    only: Iterable[str] = (),
    *,
    in_place: bool = False,
    output: Path | str | None = None,
    folder: Path | str | None = None,
    parameters: Mapping[str, object] | None = None,
    budget: float | None = None,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Run the notebooks of `folder` in order, each in a kernel of its own; gives the executed ones.

    `only`: numbers ("02") or names ("02_inversion") of those to run; all by default.
    Executed copies go to `output`, by default results/notebooks/PROFILE beside the
    folder. `in_place` stores the outputs in the notebooks themselves, so that two
    executions give the same bytes. `parameters` go to every notebook that declares
    them, whatever the profile says. `budget`: seconds after which attacks pause and
    OutOfTime says what is left; the same call goes on from there. In the end what the
    notebooks found is joined in claims.csv. `report` receives a line for each step.
    Raises `ProfileError` before anything runs for an unknown profile, notebook or
    parameter, and `NotebookError` at the first notebook that fails.
    """
    limit = _limit(budget)
    folder = Path(folder or notebooks_folder()).resolve()
    settings = plan(profile, only, folder, parameters)
    if in_place and any(settings.values()):
        raise ProfileError(
            "Notebooks are stored as they are, in the smoke profile; "
            f"{profile!r} sets parameters. Leave --in-place out."
        )
    copies = Path(output or folder.parent / "results" / "notebooks" / profile).resolve()
    target = folder if in_place else copies
    target.mkdir(parents=True, exist_ok=True)
    finished: list[Path] = []
    for name, values in settings.items():
        report(f"{name}: running, profile {profile}")
        clock = time.perf_counter()
        try:
            require_time(limit)
            finished.append(_execute(folder / f"{name}.ipynb", target, values, limit))
        except OutOfTime as pause:
            done, left = list(settings)[: len(finished)], list(settings)[len(finished) :]
            state = f"Notebooks done: {', '.join(done) or 'none'}; left: {', '.join(left)}."
            again = "The same command goes on from here."
            raise OutOfTime(f"{name} is not finished. {pause}\n{state} {again}") from pause
        report(f"{name}: done in {time.perf_counter() - clock:.0f} s")
    _join_findings(profile, settings, folder, report)
    return finished


def _limit(budget: float | None) -> float:
    if budget is None:
        return time_limit()
    if budget <= _RESERVE:
        used = f"{_RESERVE} s of it go into starting and ending"
        raise ProfileError(f"A budget of {budget:g} s is too short: {used}. Give some minutes.")
    return time.time() + budget - _RESERVE


def plan(
    profile: str,
    only: Iterable[str] = (),
    folder: Path | str | None = None,
    parameters: Mapping[str, object] | None = None,
) -> dict[str, dict]:
    """The parameters of each chosen notebook, in order: of "all", its own, and the
    given ones that it declares.

    The whole profile is checked: raises `ProfileError` for a notebook or parameter that
    does not exist.
    """
    folder = Path(folder or notebooks_folder())
    profiles = _read_profiles(folder)
    _require("profile", profile, profiles)
    own = {name: values or {} for name, values in (profiles[profile] or {}).items()}
    shared, given = own.pop("all", {}), dict(parameters or {})
    declared = _declared(folder)
    for name, values in own.items():
        _require(_NOTEBOOK, name, declared)
        for parameter in values:
            _require(f"parameter of {name}", parameter, declared[name])
    for parameter in [*shared, *given]:
        _require("parameter of any notebook", parameter, set().union(*declared.values()))
    chosen = {_named(wanted, list(declared)) for wanted in only} or set(declared)
    settings = {}
    for name in sorted(chosen):
        values = shared | own.get(name, {}) | given
        settings[name] = {key: values[key] for key in values if key in declared[name]}
    return settings


def _declared(folder: Path) -> dict[str, set[str]]:
    """The parameters of every notebook of the folder."""
    paths = [path for path in sorted(folder.glob("[0-9]*.ipynb")) if ".failed" not in path.name]
    if not paths:
        expected = "Expected NUMBER_NAME.ipynb, such as 00_quickstart.ipynb."
        raise ProfileError(f"{folder} holds no notebooks. {expected}")
    return {path.stem: set(papermill.inspect_notebook(str(path))) for path in paths}


def _read_profiles(folder: Path) -> dict[str, dict | None]:
    path = folder / "profiles.yaml"
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["profiles"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        expected = "Expected YAML: profiles: {smoke: {}, cpu: {…}}."
        raise ProfileError(f"{path} cannot be read ({error}). {expected}") from error


def _require(what: str, wanted: str, known: Collection[str]) -> None:
    if wanted not in known:
        there = ", ".join(sorted(known)) or "none"
        raise ProfileError(f"Unknown {what}: {wanted!r}. Known: {there}.")


def _named(wanted: str, names: list[str]) -> str:
    """The notebook of that name or number; "2" is "02"."""
    numbers = {name.split("_")[0].lstrip("0"): name for name in names}
    name = numbers.get(wanted.lstrip("0"), wanted)
    _require(_NOTEBOOK, name, names)
    return name


def _join_findings(
    profile: str, settings: dict[str, dict], folder: Path, report: Callable[[str], None]
) -> None:
    """claims.csv and comparisons.csv where the profile sends figures; the profile cpu
    also shows them in README.md and docs/claims.md.
    """
    from gipip.experiments.claims import collect_findings, write_findings

    places = {folder / values["figures"] for values in settings.values() if "figures" in values}
    for figures in sorted(places):
        claims, comparisons = collect_findings(figures)
        file, readme = figures.resolve() / "claims.csv", folder.parent / "README.md"
        if not file.exists():
            continue
        counted = claims["verdict"].value_counts().items()
        report(f"Claims: {', '.join(f'{count} {verdict}' for verdict, count in counted)}: {file}")
        if profile == "cpu" and write_findings(readme, claims, comparisons):
            report(f"Claims, judged: {readme}")


def _execute(source: Path, folder: Path, parameters: dict, limit: float) -> Path:
    """Execute as NAME.failed.ipynb and rename once every cell is known to have run.

    Raises OutOfTime, and leaves no copy, when a cell had to stop at the `limit`.
    """
    target = folder / source.name
    draft = target.with_suffix(".failed.ipynb")
    died = _run_cells(source, draft, parameters, limit)
    notebook = nbformat.read(draft, as_version=4)
    if problem := _unfinished(notebook) or died:
        so_far = f"The notebook as far as it ran: {draft}"
        raise NotebookError(f"{source.stem} failed: {problem} {so_far}")
    if target == source:
        nbformat.write(_stable(notebook), draft)
    os.replace(draft, target)
    return target


def _run_cells(source: Path, draft: Path, parameters: dict, limit: float) -> str:
    """Run a notebook in its folder; gives what papermill says when it did not reach the end."""
    how = {"kernel_name": "python3", "progress_bar": False, "config": _KERNEL}
    streams = {"stdout_file": sys.stdout, "stderr_file": sys.stderr}
    paths = {"input_path": str(source), "output_path": str(draft), "cwd": str(source.parent)}
    # what kernels inherit: plain progress lines, the time limit, and no JUPYTER_PATH, which would
    # outrank this environment's kernel
    inherited = {"GIPIP_DEADLINE": str(limit), "GIPIP_HEADLESS": "1"}
    try:
        with patch.dict(os.environ, inherited):
            os.environ.pop("JUPYTER_PATH", None)
            papermill.execute_notebook(**paths, parameters=parameters, **how, **streams)
    except (DeadKernelError, PapermillExecutionError, CellExecutionError) as error:
        if isinstance(error, DeadKernelError) or error.ename != OutOfTime.__name__:
            return f"{error}."
        draft.unlink()
        raise OutOfTime(error.evalue) from error
    return ""


def _stable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without timings, progress, widget state, random cell ids and versions; pictures packed."""
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:02d}"
        cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
            for output in cell.outputs:
                if png := output.get("data", {}).get("image/png"):
                    output.data["image/png"] = _packed(png)
    notebook.metadata.language_info = {"name": "python"}
    for kept in ("papermill", "widgets"):
        notebook.metadata.pop(kept, None)
    return notebook


def _packed(png: str) -> str:
    """The same pixels in fewer bytes: figures are opaque, and need no fourth channel."""
    packed = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        picture.convert("RGB").save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def _unfinished(notebook: nbformat.NotebookNode) -> str:
    """What kept a notebook from its end; empty if every code cell ran, in order, to its own end.

    An output file is no proof: a kernel that dies, or `sys.exit(0)` in a cell, leaves one too.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for position, cell in enumerate(cells, start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                return f"code cell {position} raised {output.ename}: {output.evalue}."
        if cell.execution_count != position:
            died = "did not finish: the kernel died or was told to exit"
            return f"code cell {position} of {len(cells)} {died}."
    return ""

"""The runner of the notebooks, tried on tiny ones."""

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from gipip.errors import OutOfTime, ProfileError
from gipip.evaluation.statistics import Interval
from gipip.experiments.claims import Comparison, save_findings
from gipip.experiments.endpoints import NOT_MEASURED, STUDY
from gipip.reproduce import NotebookError, notebooks_folder, plan, run

PARAMETERS = "iterations = 1\nname = 'smoke'"
PROFILES = {
    "smoke": None,
    "cpu": {"all": {"iterations": 2, "size": 64}, "02_second": {"iterations": 3}},
    "unknown-notebook": {"09_ninth": {"iterations": 2}},
    "unknown-parameter": {"01_first": {"iteration": 2}},
    "unknown-shared-parameter": {"all": {"iteration": 2}},
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "profiles.yaml").write_text(yaml.safe_dump({"profiles": PROFILES}))
    write(folder, "01_first", "print(iterations, name)")
    write(folder, "02_second", "print(iterations, name)", parameters=PARAMETERS + "\nsize = 32")
    return folder


def write(folder, name, *cells, parameters=PARAMETERS):
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# Claim"), tagged, *map(new_code_cell, cells)]
    kernel = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")


def printed(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(
        output.text for cell in cells if cell.cell_type == "code" for output in cell.outputs
    )


def test_a_profile_gives_shared_parameters_to_those_that_declare_them_and_own_ones_win(folder):
    assert plan("cpu", folder=folder) == {
        "01_first": {"iterations": 2},
        "02_second": {"iterations": 3, "size": 64},
    }
    assert plan("smoke", folder=folder) == {"01_first": {}, "02_second": {}}


def test_given_parameters_go_to_every_notebook_that_declares_them_and_win(folder):
    given = {"iterations": "9", "size": "16"}
    assert plan("cpu", folder=folder, parameters=given) == {
        "01_first": {"iterations": "9"},
        "02_second": given,
    }
    with pytest.raises(ProfileError, match="Unknown parameter of any notebook: 'colour'"):
        plan("cpu", folder=folder, parameters={"colour": "red"})


@pytest.mark.parametrize("wanted", ["2", "02", "02_second"])
def test_a_notebook_is_chosen_by_number_or_name(folder, wanted):
    assert list(plan("smoke", [wanted], folder)) == ["02_second"]


def test_notebooks_run_in_order_however_they_are_asked_for(folder):
    assert list(plan("smoke", ["02", "01", "2"], folder)) == ["01_first", "02_second"]


@pytest.mark.parametrize(
    ("profile", "only", "message"),
    [
        ("gpu", (), "Unknown profile: 'gpu'. Known: cpu, smoke"),
        ("smoke", ("07",), "Unknown notebook: '07'. Known: 01_first, 02_second."),
        ("unknown-notebook", (), "Unknown notebook: '09_ninth'. Known: 01_first, 02_second."),
        (
            "unknown-parameter",
            (),
            "Unknown parameter of 01_first: 'iteration'. Known: iterations, name.",
        ),
        (
            "unknown-shared-parameter",
            (),
            "Unknown parameter of any notebook: 'iteration'. Known: iterations, name, size.",
        ),
    ],
)
def test_what_does_not_exist_is_named_beside_what_does(folder, profile, only, message):
    with pytest.raises(ProfileError, match=message.replace(".", r"\.")):
        run(profile, only, folder=folder)


def test_a_folder_without_notebooks_is_an_error(folder):
    for notebook in folder.glob("*.ipynb"):
        notebook.unlink()
    with pytest.raises(ProfileError, match="holds no notebooks"):
        run("smoke", folder=folder)


@pytest.mark.parametrize("text", ["profiles: [", "", "cpu: {}"])
def test_unreadable_profiles_are_an_error(folder, text):
    (folder / "profiles.yaml").write_text(text)
    with pytest.raises(ProfileError, match=r"profiles\.yaml cannot be read"):
        plan("cpu", folder=folder)


def test_an_executed_copy_holds_the_outputs_with_the_profiles_parameters(folder, capfd):
    source = (folder / "02_second.ipynb").read_bytes()
    (copy,) = run("cpu", ["02"], folder=folder)
    assert copy == folder.parent / "results" / "notebooks" / "cpu" / "02_second.ipynb"
    assert printed(copy) == "3 smoke\n"
    assert "3 smoke" in capfd.readouterr().out, "the output of cells is relayed"
    assert (folder / "02_second.ipynb").read_bytes() == source
    assert [path.name for path in copy.parent.iterdir()] == ["02_second.ipynb"]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("raise ValueError('too small')", "code cell 2 raised ValueError: too small"),
        ("import sys; sys.exit(0)", "code cell 2 raised SystemExit: 0"),
        ("import os; os._exit(0)", "code cell [23] of 3 did not finish"),
    ],
)
def test_a_notebook_that_stops_half_way_is_kept_as_failed_and_nothing_else(
    folder, cell, message, in_place
):
    write(folder, "01_first", cell, "print('after')")
    source = (folder / "01_first.ipynb").read_bytes()
    with pytest.raises(NotebookError, match=message) as caught:
        run("smoke", folder=folder, in_place=in_place, output=folder.parent / "out")
    target = folder if in_place else folder.parent / "out"
    failed = target / "01_first.failed.ipynb"
    assert str(failed) in str(caught.value)
    assert failed.exists()
    assert (folder / "01_first.ipynb").read_bytes() == source
    assert sorted(path.name for path in (folder.parent / "out").glob("*.ipynb")) == (
        [] if in_place else ["01_first.failed.ipynb"]
    )
    assert list(plan("smoke", folder=folder)) == ["01_first", "02_second"], (
        "a failed copy is no notebook"
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_a_kernel_that_dies_in_the_last_cell_is_a_failure_too(folder, in_place):
    write(folder, "01_first", "import os; os._exit(0)")
    with pytest.raises(NotebookError, match="01_first failed: .*[Kk]ernel died"):
        run("smoke", ["01"], folder=folder, in_place=in_place)


def test_executing_in_place_twice_gives_the_same_bytes(folder):
    write(
        folder,
        "01_first",
        "import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')",
        "{'iterations': iterations}",
    )
    run("smoke", ["01"], in_place=True, folder=folder)
    first = (folder / "01_first.ipynb").read_bytes()
    run("smoke", ["01"], in_place=True, folder=folder)
    assert (folder / "01_first.ipynb").read_bytes() == first
    notebook = nbformat.read(folder / "01_first.ipynb", as_version=4)
    assert [cell.id for cell in notebook.cells] == ["cell-00", "cell-01", "cell-02", "cell-03"]
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2, 3]
    assert notebook.metadata.language_info == {"name": "python"}
    assert notebook.cells[3].outputs[0].data["text/plain"] == "{'iterations': 1}"


def test_only_a_profile_without_parameters_is_executed_in_place(folder):
    with pytest.raises(ProfileError, match="--in-place"):
        run("cpu", in_place=True, folder=folder)


def test_kernels_are_headless_and_ignore_a_foreign_jupyter_path(folder, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", "/nowhere")
    monkeypatch.delenv("GIPIP_HEADLESS")
    variables = "os.environ['GIPIP_HEADLESS'], os.environ.get('JUPYTER_PATH')"
    write(folder, "01_first", f"import os\nprint({variables}, os.path.basename(os.getcwd()))")
    (copy,) = run("smoke", ["01"], folder=folder)
    assert printed(copy) == "1 None notebooks\n"


LIMITED = """import os, time
class OutOfTime(Exception): "gipip.errors.OutOfTime takes seconds to import"
if time.time() < float(os.environ['GIPIP_DEADLINE']) - 3600 * {hours}:
    print('time enough')
else:
    raise OutOfTime('2 of 3 runs are finished, 1 are left.')"""


@pytest.mark.parametrize("in_place", [False, True])
def test_a_notebook_that_is_out_of_time_is_left_for_the_next_time_and_not_a_failed_one(
    folder, in_place
):
    write(folder, "02_second", LIMITED.format(hours=2), parameters=PARAMETERS + "\nsize = 32")
    out, reports = folder.parent / "out", []
    options = {"folder": folder, "in_place": in_place, "output": out, "report": reports.append}
    left = r"2 of 3 runs are finished, 1 are left\.\nNotebooks done: 01_first; left: 02_second\."
    message = rf"02_second is not finished\. {left}"
    with pytest.raises(OutOfTime, match=message):
        run("smoke", budget=3600, **options)
    assert not list(folder.parent.rglob("*.failed.ipynb")) and "01_first: done" in reports[1]
    assert [path.stem for path in run("smoke", budget=3 * 3600, **options)] == [
        "01_first",
        "02_second",
    ]


def test_no_notebook_begins_when_the_time_is_over(folder, monkeypatch):
    monkeypatch.setenv("GIPIP_DEADLINE", "0")
    with pytest.raises(OutOfTime, match="Notebooks done: none; left: 01_first, 02_second"):
        run("smoke", folder=folder)


def test_a_budget_that_leaves_no_time_is_refused(folder):
    with pytest.raises(ProfileError, match="A budget of 20 s is too short"):
        run("smoke", folder=folder, budget=20)


PLACES = {"smoke": "../figures/smoke", "cpu": "../figures", "paper": "../figures/paper"}


@pytest.fixture
def comparisons(tmp_path):
    """The file that a notebook writes with one comparison."""
    found = Comparison(1, "GIPIP − IG", "psnr", 24, Interval(0.5, 0.25, 0.75, 6))
    save_findings("01_first", [], [found], tmp_path / "saved")
    return (tmp_path / "saved" / "01_first_comparisons.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("profile", "joined"),
    [("smoke", []), ("cpu", ["figures/claims.csv"]), ("paper", ["figures/paper/claims.csv"])],
)
def test_smoke_joins_no_claims_and_only_cpu_shows_them_in_the_readme(
    folder, profile, joined, comparisons
):
    settings = {
        name: {"all": {"figures": place}} if name != "smoke" else {}
        for name, place in PLACES.items()
    }
    (folder / "profiles.yaml").write_text(yaml.safe_dump({"profiles": settings}))
    cell = (
        "import pathlib\npathlib.Path(figures).mkdir(parents=True)\n"
        f"pathlib.Path(figures, '01_first_comparisons.csv').write_text({comparisons!r})"
    )
    write(folder, "01_first", cell, parameters=f"figures = {PLACES['smoke']!r}")
    readme = folder.parent / "README.md"
    readme.write_text("<!-- claims: written by make reproduce -->\n<!-- end of claims -->\n")
    said = []
    run(profile, ["01"], folder=folder, report=said.append)
    assert [
        path.relative_to(folder.parent).as_posix() for path in folder.parent.rglob("claims.csv")
    ] == joined
    assert (STUDY[1].claim in readme.read_text(encoding="utf-8")) == (profile == "cpu")
    counts = f"{len(STUDY)} {NOT_MEASURED}"
    told = [f"Claims: {counts}: {folder.parent / path}" for path in joined]
    assert said[2:] == told + [f"Claims, judged: {readme}"] * (profile == "cpu")


def test_without_a_readme_beside_the_notebooks_none_is_made(folder, comparisons):
    (folder / "profiles.yaml").write_text(
        yaml.safe_dump({"profiles": {"cpu": {"all": {"figures": "../figures"}}}})
    )
    (folder.parent / "figures").mkdir()
    (folder.parent / "figures" / "02_second_comparisons.csv").write_text(comparisons)
    write(folder, "01_first", parameters="figures = ''")
    run("cpu", ["01"], folder=folder)
    assert (folder.parent / "figures" / "comparisons.csv").read_text() == comparisons
    assert not (folder.parent / "README.md").exists()


def test_the_notebooks_of_a_checkout_lie_beside_the_package():
    assert (notebooks_folder() / "profiles.yaml").is_file()

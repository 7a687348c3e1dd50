"""The committed notebooks are executed, checked ones: nbval passes a notebook without
outputs, whatever is in it.
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from gipip.reproduce import notebooks_folder, plan

FOLDER = notebooks_folder()
NOTEBOOKS = [path for path in sorted(FOLDER.glob("*.ipynb")) if not path.stem.endswith(".failed")]
CODE_LINES, LINE, LAST = 75, 100, "## What the full run found"
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:home|root|Users|work|tmp|mnt|opt|usr|var)/|[A-Z]:\\\\?Users|site-packages"
)


def problems(notebook: NotebookNode) -> list[str]:
    """Everything that keeps an executed notebook from being one that nbval can check."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = {
        "a title in the first cell": notebook.cells[0].cell_type == "markdown"
        and notebook.cells[0].source.startswith("# "),
        "the kernel python3": notebook.metadata.get("kernelspec", {}).get("name") == "python3",
        "no empty code cells": all(cell.source.strip() for cell in code),
        "code cells, all executed, in order, without errors": code and _executed(code),
        "nothing on stderr": not any(
            output.get("name") == "stderr" for cell in code for output in cell.outputs
        ),
        "one cell tagged parameters": sum(
            "parameters" in cell.metadata.get("tags", []) for cell in code
        )
        == 1,
        "a check cell with outputs": any(
            cell.source.startswith("# NBVAL_CHECK_OUTPUT") and cell.outputs for cell in code
        ),
        "no check cell without outputs": all(
            cell.outputs for cell in code if cell.source.startswith("# NBVAL_CHECK_OUTPUT")
        ),
        "no def, class or lambda": not _nodes(code, *DEFINITIONS),
        "no comprehension inside another": not any(
            isinstance(inner, COMPREHENSIONS)
            for outer in _nodes(code, *COMPREHENSIONS)
            for inner in list(ast.walk(outer))[1:]
        ),
        "a message in every assert": all(node.msg for node in _nodes(code, ast.Assert)),
        f"lines of at most {LINE} characters": all(
            len(line) <= LINE for cell in code for line in cell.source.splitlines()
        ),
        f"{LAST!r} as the last section": _headings(notebook)[-1:] == [LAST],
        f"at most {CODE_LINES} lines of code": sum(_code_lines(cell.source) for cell in code)
        <= CODE_LINES,
        "no widget state": "widgets" not in notebook.metadata,
        "no paths of one machine": not any(
            MACHINE_PATH.search(text) for cell in notebook.cells for text in _texts(cell)
        ),
    }
    return [expected for expected, holds in found.items() if not holds]


def _executed(code: list[NotebookNode]) -> bool:
    """Whether every code cell that is not empty ran, in order and without an error."""
    code = [cell for cell in code if cell.source.strip()]
    outputs = [output for cell in code for output in cell.outputs]
    counts = [cell.execution_count for cell in code]
    in_order = counts == list(range(1, len(code) + 1))
    return in_order and not any(output.output_type == "error" for output in outputs)


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _nodes(code: list[NotebookNode], *kinds: type[ast.AST]) -> list:
    """The nodes of these kinds in the syntax trees of code cells, magics apart."""
    sources = [re.sub(r"^\s*[%!].*", "", cell.source, flags=re.MULTILINE) for cell in code]
    trees = [ast.parse(source) for source in sources]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]


def _headings(notebook: NotebookNode) -> list[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [line for line in text.splitlines() if line.startswith("## ")]


def _code_lines(source: str) -> int:
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") for line in source.splitlines()
    )


def _texts(cell: NotebookNode) -> list[str]:
    """A cell's source and the readable part of its outputs."""
    shown = [
        {"text": output.get("text", ""), **output.get("data", {})}
        for output in cell.get("outputs", [])
    ]
    return [cell.source] + [
        text for output in shown for kind, text in output.items() if kind.startswith("text")
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_executed_and_checks_something(path):
    assert problems(nbformat.read(path, as_version=4)) == []


def links(cell: NotebookNode) -> list[str]:
    """The notebooks that a cell's Markdown links to."""
    return re.findall(r"\]\((\w+\.ipynb)\)", cell.source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_links_to_its_neighbours_at_its_top_and_at_its_bottom(path):
    place, names = NOTEBOOKS.index(path), [path.name for path in NOTEBOOKS]
    neighbours = {*names[max(place - 1, 0) : place], *names[place + 1 : place + 2]}
    cells = nbformat.read(path, as_version=4).cells
    assert neighbours <= set(links(cells[0])) and neighbours <= set(links(cells[-1]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_that_one_links_to_exist(path):
    cells = nbformat.read(path, as_version=4).cells
    linked = {name for cell in cells if cell.cell_type == "markdown" for name in links(cell)}
    assert linked <= {path.name for path in NOTEBOOKS}


TERMS = """client; server; update; gradient matching; total variation; anomaly score; prior; batch;
auxiliary data; FedSGD; FedAvg; PSNR; SSIM; LPIPS; condition; tuned; as released"""


@pytest.mark.parametrize("term", TERMS.replace("\n", " ").split("; "))
def test_the_glossary_explains(term):
    page = FOLDER.parent / "docs" / "glossary.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| **")]
    assert any(term in row.split("**")[1].split(", ") for row in rows)


def test_the_committed_notebooks_are_small():
    sizes = {path.stem: path.stat().st_size for path in NOTEBOOKS}
    assert sum(sizes.values()) < 3_000_000
    assert sizes["06_imagenet64"] < 600_000


@pytest.mark.parametrize("profile", ["smoke", "cpu", "paper"])
def test_a_profile_sets_only_parameters_that_the_notebooks_declare(profile):
    assert list(plan(profile, folder=FOLDER)) == [path.stem for path in NOTEBOOKS]


def test_the_smoke_profile_is_what_stands_in_the_notebooks():
    assert not any(plan("smoke", folder=FOLDER).values())


def sound() -> NotebookNode:
    """A notebook without any of the problems."""
    shown = [new_output("stream", name="stdout", text="the prior helps\n")]
    cells = [
        new_markdown_cell("# A claim"),
        new_code_cell("iterations = 2", execution_count=1, metadata={"tags": ["parameters"]}),
        new_code_cell(
            "# NBVAL_CHECK_OUTPUT\nprint('the prior helps')", execution_count=2, outputs=shown
        ),
        new_markdown_cell(LAST),
    ]
    return new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )


def test_the_guard_lets_a_sound_notebook_pass():
    assert problems(sound()) == []


VACUOUS = {
    "a title in the first cell": lambda notebook: notebook.cells.pop(0),
    "the kernel python3": lambda notebook: notebook.metadata.kernelspec.update(name="gipip"),
    "no empty code cells": lambda notebook: notebook.cells.append(new_code_cell("")),
    "code cells, all executed, in order, without errors": lambda notebook: notebook.cells[1].update(
        execution_count=7
    ),
    "nothing on stderr": lambda notebook: notebook.cells[2].outputs.append(
        new_output("stream", name="stderr", text="UserWarning: careful")
    ),
    "one cell tagged parameters": lambda notebook: notebook.cells[1].metadata.update(tags=[]),
    "a check cell with outputs": lambda notebook: notebook.cells[2].update(
        source="print('the prior helps')"
    ),
    "no def, class or lambda": lambda notebook: notebook.cells[1].update(source="f = lambda: 0"),
    "no comprehension inside another": lambda notebook: notebook.cells[1].update(
        source="a = [sum(i for i in row) for row in [[1]]]"
    ),
    "a message in every assert": lambda notebook: notebook.cells[1].update(source="assert 1"),
    f"lines of at most {LINE} characters": lambda notebook: notebook.cells[1].update(
        source=f"a = {'1' * LINE}"
    ),
    f"{LAST!r} as the last section": lambda notebook: notebook.cells.append(
        new_markdown_cell("## And then")
    ),
    f"at most {CODE_LINES} lines of code": lambda notebook: notebook.cells[1].update(
        source="a = 1\n" * CODE_LINES
    ),
    "no widget state": lambda notebook: notebook.metadata.update(widgets={}),
    "no paths of one machine": lambda notebook: (
        notebook.cells[2].outputs[0].update(text=f"saved {Path('/home/someone')}/figure.png\n")
    ),
}


@pytest.mark.parametrize("expected", VACUOUS)
def test_the_guard_catches(expected):
    notebook = sound()
    VACUOUS[expected](notebook)
    assert problems(notebook) == [expected]


def test_the_guard_catches_a_notebook_that_was_never_executed():
    notebook = sound()
    for cell in notebook.cells[1:3]:
        cell.update(execution_count=None, outputs=[])
    expected = [
        "code cells, all executed, in order, without errors",
        "a check cell with outputs",
        "no check cell without outputs",
    ]
    assert problems(notebook) == expected


def test_the_guard_catches_an_error_output():
    notebook = sound()
    notebook.cells[1].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
    assert problems(notebook) == ["code cells, all executed, in order, without errors"]


def test_the_guard_catches_an_empty_notebook():
    assert "code cells, all executed, in order, without errors" in problems(
        new_notebook(cells=[new_markdown_cell("# A claim")])
    )

"""README and docs: links lead somewhere, names and commands exist, examples run, and every
measured number stands in a generated section.
"""

import ast
import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest
import typer

import gipip
from gipip.cli import app
from gipip.experiments.claims import collect_findings, write_findings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("**/*.md"))]
GENERATED = r"^<!-- \w+: written by .*?^<!-- end of \w+ -->$"
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The text of the page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without generated sections and without code blocks."""
    text = re.sub(GENERATED, "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.replace(" ", "-") for word in words}


@EACH_PAGE
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{link} leads nowhere"
        assert not heading or heading in anchors(target), f"{link} leads to no heading"


@EACH_PAGE
def test_every_file_that_is_named_exists(page):
    named = re.findall(
        r"`((?:gipip|data|docs|figures|benchmarks|notebooks|tests)/[\w./%-]*)`", prose(page)
    )
    committed = [name for name in named if "_build" not in name]
    assert [name for name in committed if not (ROOT / name).exists()] == []


@EACH_PAGE
def test_every_name_of_the_library_exists(page):
    for name in set(re.findall(r"(?<![/\w])gipip(?:\.[A-Za-z_]\w*)+", page.read_text())):
        found = gipip
        for index, part in enumerate(name.split(".")[1:], start=1):
            if not hasattr(found, part):
                importlib.import_module(".".join(name.split(".")[: index + 1]))
            found = getattr(found, part)


@EACH_PAGE
def test_every_example_in_python_is_well_formed(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@EACH_PAGE
def test_every_command_and_its_options_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = typer.main.get_command(app).commands
    code = "\n".join([*blocks(page, "sh"), *re.findall(r"`([^`\n]+)`", prose(page))])
    assert set(re.findall(r"\bmake ([a-z]+)$", code, re.MULTILINE)) <= targets
    for command, rest in re.findall(r"\bgipip ([a-z][a-z0-9-]*)([^\n;]*)", code):
        options = {option for given in commands[command].params for option in given.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, f"gipip {command}{rest}"


@EACH_PAGE
def test_every_extra_exists(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"pip install '\.\[(\w+)\]'", page.read_text())
    assert set(extras) <= set(project["optional-dependencies"])


MEASURED = re.compile(
    r"\d+(?:[.,]\d+)?[  ]?(?:dB|%|ms|s|seconds?|minutes?|hours?|[GM]i?B|×|times)(?!\w)"
    r"|[+−]\d|(?<!\d)0?\.\d{2,}"  # differences; SSIM, LPIPS and shares
    r"|\d[\d,]* (?:[a-z]+ )?(?:images|photographs|batches|runs)"
)
GIVEN = {  # what the paper reports, conventions of statistics, settings, and sizes of data sets
    *("16.12 dB", "3.8 %", "70 %", "95 %", "0.05", "1 dB", "0.25", "0.001", "0.003", "0.01"),
    *("1,900 images", "1,900 public images", "1,900 auxiliary images", "50,000 training images"),
    *("2,356 images", "760 images", "32 images", "16 images"),
    *("20 photographs", "48,600 photographs", "3.79 %"),
}


def markdown(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


@EACH_PAGE
def test_measured_numbers_stand_in_generated_sections_only(page):
    if page.name == "study.md":
        pytest.skip("a plan: its numbers are fixed, not measured")
    text = re.sub(r"\d+×\d+", "", prose(page))  # sizes of images
    assert set(MEASURED.findall(text)) <= GIVEN


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("notebooks/*.ipynb")))
def test_no_measured_number_is_typed_into_a_notebook(name):
    text = re.sub(r"\d+×\d+", "", markdown(ROOT / "notebooks" / name))
    assert set(MEASURED.findall(text)) <= GIVEN


@pytest.mark.parametrize(
    "text",
    ["16.9 dB", "SSIM .337", "LPIPS 0.21", "+0.25 [", "in 40 minutes", "31 images", "12.8 %"],
)
def test_a_measured_number_is_found(text):
    assert set(MEASURED.findall(text)) - GIVEN


@EACH_PAGE
def test_a_page_has_a_title_and_says_at_once_what_it_answers(page):
    title, empty, first, *_ = page.read_text().splitlines()
    assert title.startswith("# ") and not empty
    assert first.startswith("This page ") or page == README


def test_the_readme_is_short():
    assert README.stat().st_size <= 8_000


def test_the_ten_lines_of_the_readme_recover_images(tmp_path, monkeypatch, capsys):
    code = blocks(README, "python")[0]
    assert len(code.splitlines()) == 10
    monkeypatch.chdir(tmp_path)
    exec(code.replace("iterations=300", "iterations=3"), {})
    assert capsys.readouterr().out.count("\n") >= 5, "a row for each of the four images"
    assert (tmp_path / "recovered.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["own_attack.md", "own_defense.md"])
def test_the_examples_of_a_page_run(name, monkeypatch):
    monkeypatch.setitem(gipip.ATTACKS, "dim", None)  # and is taken out again
    names: dict = {}
    for block in blocks(ROOT / "docs" / name, "python"):
        exec(block.replace("iterations=100", "iterations=2"), names)


@pytest.mark.parametrize("name", ["README.md", "docs/claims.md"])
def test_the_tables_of_claims_are_those_of_the_figures(tmp_path, name):
    for page in ("README.md", "docs/claims.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_bytes((ROOT / page).read_bytes())
    for path in (ROOT / "figures").glob("[0-9]*_*s.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert write_findings(tmp_path / "README.md", *collect_findings(tmp_path))
    assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


def test_architecture_answers_where_six_things_go():
    rows = re.findall(
        r"^\| (an?(?:other)? .*?) \| (.*) \|$",
        (ROOT / "docs" / "architecture.md").read_text(),
        re.MULTILINE,
    )
    assert [what for what, _ in rows] == [
        "a new attack",
        "another distance",
        "a new defence",
        "another data set",
        "a new figure",
        "another cluster",
    ]
    assert all(re.search(r"`gipip/[\w/]+(\.py|/)`", where) for _, where in rows)

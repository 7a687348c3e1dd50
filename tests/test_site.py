"""The site that `make docs` builds, as a reader meets it: no link is dead, nothing is left out."""

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs" / "_build" / "html"
PAGES = sorted([*SITE.glob("docs/**/*.html"), *SITE.glob("notebooks/*.html")])

pytestmark = pytest.mark.skipif(not PAGES, reason="the site is not built: make docs")


class _Page(HTMLParser):
    """`ids`: where links can lead to. `links`: to pages and pictures."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        self.links |= {given[name] for name in ("href", "src") if given.get(name)}


page_of = cache(_Page)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_link_of_a_page_is_dead(path):
    for link in page_of(path).links:
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        assert target.is_file(), f"{link} leads nowhere"
        known = target.suffix != ".html" or unquote(parts.fragment) in page_of(target).ids
        assert known, f"{link} leads to no place of the page"


def test_every_public_name_has_its_place_in_the_reference():
    stub = (ROOT / "gipip" / "__init__.pyi").read_text()
    names = set(re.findall(r"import (\w+) as", stub)) - {"ATTACKS"}
    documented = set().union(*(page_of(path).ids for path in SITE.glob("docs/api/*.html")))
    assert {f"gipip.{name}" for name in names} <= documented


def test_every_notebook_is_a_chapter_with_its_outputs():
    chapters = {path.stem: path.read_text() for path in SITE.glob("notebooks/*.html")}
    assert set(chapters) == {path.stem for path in ROOT.glob("notebooks/*.ipynb")}
    assert all("cell_output" in text and "<img" in text for text in chapters.values())


def test_the_front_page_leads_to_the_start():
    assert "docs/index.html" in page_of(SITE / "index.html").links

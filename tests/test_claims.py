"""The claims table: what the notebooks judged is what `gipip reproduce` shows, digit
for digit.
"""

import csv
import math

import pytest

from gipip.errors import DataError
from gipip.evaluation.statistics import Interval, paired_difference
from gipip.experiments.claims import Claim, collect_claims, save_claims, write_readme_section

START, END = "<!-- claims: written by make reproduce -->", "<!-- end of claims -->"
HELPS = Interval(0.1 + 0.2, 1 / 3, 2 / 3, 6)
UNCERTAIN = Interval(0.1, -0.2, 0.4, 8)


def a_claim(
    claim="1 The score helps",
    compared="GIPIP − IG, B = 4",
    metric="psnr",
    images=24,
    difference=HELPS,
):
    return Claim(claim, compared, metric, images, difference)


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        f"# Title\n\nbefore\n\n{START}\nwritten later\n{END}\n\nafter\n", encoding="utf-8"
    )
    return path


@pytest.fixture
def page(tmp_path):
    """docs/claims.md beside the README."""
    path = tmp_path / "docs" / "claims.md"
    path.parent.mkdir()
    path.write_text(f"# Claims\n{START}\n{END}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_fewer_than_six_batches_decide_nothing_however_large_the_difference(batches):
    groups = [image % batches for image in range(20)]
    difference = paired_difference([9.0] * 20, [1.0] * 20, groups=groups)
    assert a_claim(difference=difference).verdict == "undecided at this scale"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 0.5, "supported"),
        (-0.5, -0.1, "not supported"),
        (-0.1, 0.5, "undecided at this scale"),
    ],
)
def test_six_batches_decide_when_the_interval_leaves_out_zero(low, high, verdict):
    assert a_claim(difference=Interval((low + high) / 2, low, high, 6)).verdict == verdict


def test_a_saved_file_holds_every_number_to_the_last_digit(tmp_path):
    save_claims(
        "03_ablations",
        [a_claim(), a_claim(metric="ssim", difference=Interval(-1e-9, -1e-8, -1e-10, 7))],
        tmp_path / "new",
    )
    first, second = rows(tmp_path / "new" / "03_ablations_claims.csv")
    assert list(first) == [
        "claim",
        "compared",
        "metric",
        "images",
        "batches",
        "mean",
        "low",
        "high",
        "verdict",
    ]
    assert (first["claim"], first["compared"], first["metric"]) == (
        "1 The score helps",
        "GIPIP − IG, B = 4",
        "psnr",
    )
    assert (int(first["images"]), int(first["batches"])) == (24, 6)
    assert tuple(float(first[name]) for name in ("mean", "low", "high")) == HELPS[:3]
    assert (float(second["mean"]), second["verdict"]) == (-1e-9, "not supported")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["03_ablations_claims.csv"]


def test_the_table_shown_is_the_table_collected(tmp_path):
    shown = save_claims(
        "03_ablations",
        [a_claim(), a_claim(metric="ssim", difference=Interval(1 / 7, math.nan, math.nan, 1))],
        tmp_path,
    )
    collected = collect_claims(tmp_path)
    assert collected.equals(shown)
    assert collected.dtypes.equals(shown.dtypes)


@pytest.mark.parametrize(
    ("name", "claims", "message"),
    [
        ("03_ablations", [], "found 0 claims of '03_ablations'"),
        (
            "03_ablations",
            [a_claim(), a_claim(metric="ssim"), a_claim(images=8)],
            "the same twice: GIPIP − IG, B = 4 by psnr",
        ),
        ("ablations", [a_claim()], "notebook's name such as '03_ablations'.*of 'ablations'"),
    ],
)
def test_what_cannot_be_judged_once_and_collected_is_refused(name, claims, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_claims(name, claims, tmp_path)
    assert not list(tmp_path.iterdir())


def test_claims_are_collected_by_claim_then_notebook_then_as_saved(tmp_path):
    save_claims("04_defences", [a_claim("1 Helps", "d"), a_claim("2 Survives", "e")], tmp_path)
    save_claims(
        "02_inversion",
        [a_claim("2 Survives", "b"), a_claim("1 Helps", "z"), a_claim("1 Helps", "a")],
        tmp_path,
    )
    table = collect_claims(tmp_path)
    assert list(table["compared"]) == ["z", "a", "d", "b", "e"]
    assert [row["compared"] for row in rows(tmp_path / "claims.csv")] == list(table["compared"])


def test_collecting_again_changes_nothing(tmp_path):
    save_claims("02_inversion", [a_claim()], tmp_path)
    first = collect_claims(tmp_path)
    content = (tmp_path / "claims.csv").read_bytes()
    assert collect_claims(tmp_path).equals(first), "claims.csv is not collected itself"
    assert (tmp_path / "claims.csv").read_bytes() == content


@pytest.mark.parametrize("there", [True, False])
def test_without_claims_the_table_is_empty_and_no_file_is_written(tmp_path, there):
    figures = tmp_path if there else tmp_path / "figures"
    assert collect_claims(figures).empty
    assert not list(tmp_path.iterdir())


COLUMNS = "claim,compared,metric,images,batches,mean,low,high"


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{COLUMNS}\n1,a,psnr,4,6,1,0,2\n",
        f"{COLUMNS},verdict\n1,a,psnr,4,6,one,0,2,supported\n",
    ],
)
def test_a_file_that_is_no_table_of_claims_is_named(tmp_path, text):
    (tmp_path / "02_claims.csv").write_text(text)
    with pytest.raises(
        DataError,
        match=r"02_claims\.csv is no table of claims .*Expected the columns claim, .*, verdict",
    ):
        collect_claims(tmp_path)


def test_the_readme_counts_the_verdicts_of_each_claim(tmp_path, readme):
    claims = [a_claim(), a_claim(metric="ssim"), a_claim(compared="b", difference=UNCERTAIN)]
    claims += [a_claim("2 Survives", difference=UNCERTAIN)]
    assert write_readme_section(readme, save_claims("02_inversion", claims, tmp_path))
    assert readme.read_text(encoding="utf-8") == "\n".join(
        [
            "# Title",
            "",
            "before",
            "",
            START,
            "",
            "| claim | supported | not supported | undecided at this scale |",
            "| --- | --- | --- | --- |",
            "| 1 The score helps | 2 | 0 | 1 |",
            "| 2 Survives | 0 | 0 | 1 |",
            "",
            END,
            "",
            "after",
            "",
        ]
    )


def test_the_page_of_claims_shows_every_difference_in_its_unit(tmp_path, readme, page):
    claims = [
        a_claim(difference=Interval(1.567, 0.484, 2.766, 6)),
        a_claim(
            compared="IG − GIPIP, |ΔW| = 1",
            metric="lpips",
            difference=Interval(-0.0204, -0.0443, 0.0012, 8),
        ),
        a_claim(
            "2 Survives",
            metric="accuracy",
            images=4,
            difference=Interval(0.25, math.nan, math.nan, 1),
        ),
    ]
    write_readme_section(readme, save_claims("02_inversion", claims, tmp_path))
    header = [
        "| compared | metric | images | batches | difference | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    assert page.read_text(encoding="utf-8").splitlines() == [
        "# Claims",
        START,
        "",
        "## 1 The score helps",
        "",
        *header,
        "| GIPIP − IG, B = 4 | psnr | 24 | 6 | +1.57 [+0.48, +2.77] dB | supported |",
        "| IG − GIPIP, \\|ΔW\\| = 1 | lpips | 24 | 8 | −0.020 [−0.044, +0.001] "
        "| undecided at this scale |",
        "",
        "## 2 Survives",
        "",
        *header,
        "| GIPIP − IG, B = 4 | accuracy | 4 | 1 | +0.250 (no interval) | undecided at this scale |",
        "",
        END,
    ]


def test_writing_the_same_table_again_gives_the_same_bytes(tmp_path, readme, page):
    claims = [a_claim(compared=r"a \1 \g<0>"), a_claim(compared=f"{START} b")]
    table = save_claims("02_inversion", claims, tmp_path)
    write_readme_section(readme, table)
    first = readme.read_bytes(), page.read_bytes()
    assert write_readme_section(readme, collect_claims(tmp_path))
    assert (readme.read_bytes(), page.read_bytes()) == first


def test_a_new_table_replaces_the_old_one(tmp_path, readme, page):
    write_readme_section(readme, save_claims("02_inversion", [a_claim(compared="old")], tmp_path))
    write_readme_section(readme, save_claims("02_inversion", [a_claim(compared="new")], tmp_path))
    text = page.read_text(encoding="utf-8")
    assert "| new |" in text and "| old |" not in text
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("\n\nafter\n")


@pytest.mark.parametrize(
    "text", ["", "# Title\n", f"{START}\n", f"{END}\n{START}\n", f"As `{START}`\n{END}\n", None]
)
def test_a_readme_without_the_two_lines_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    if text is not None:
        readme.write_text(text)
    assert not write_readme_section(readme, save_claims("02_inversion", [a_claim()], tmp_path))
    assert (readme.read_text() if readme.exists() else None) == text

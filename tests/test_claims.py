"""The claims: six endpoints get a verdict, corrected together; what is judged is what is shown."""

import math

import numpy
import pandas
import pytest
import scipy.stats

from gipip.errors import DataError
from gipip.evaluation.statistics import Interval, holm, stratified_test
from gipip.experiments.claims import Comparison, collect_findings, save_findings, write_findings
from gipip.experiments.endpoints import NO_FAIR_OPPONENT, NOTHING_RECOVERED, STUDY, Endpoint, Part

START, END = "<!-- claims: written by make reproduce -->", "<!-- end of claims -->"
HELPS = Interval(0.1 + 0.2, 1 / 3, 2 / 3, 6)


def drawn(mean: float, count: int, spread: float = 1.0, seed: int = 0) -> numpy.ndarray:
    """Normal values with exactly this mean."""
    values = numpy.random.default_rng(seed).normal(0, spread, count)
    return values - values.mean() + mean


def planned(number: int, mean: float, **about) -> Endpoint:
    """An endpoint with all planned units, whose strata have this mean."""
    plan = STUDY[number]
    strata = [drawn(mean, count) for count in plan.units]
    return Endpoint(number, **{"model": plan.model, "parts": [Part(strata)], **about})


def verdicts(folder, *endpoints: Endpoint) -> dict[int, str]:
    save_findings("02_inversion", endpoints, [], folder)
    claims, _ = collect_findings(folder)
    return {int(row.claim[0]): row.verdict for row in claims.itertuples()}


def comparison(about=1, compared="GIPIP − IG, B = 4", metric="psnr", images=24, difference=HELPS):
    return Comparison(about, compared, metric, images, difference)


# The tests ------------------------------------------------------------------------


def test_one_stratum_is_tested_as_by_students_t_test():
    values = drawn(0.3, 20)
    interval, p = stratified_test([values], above=0.1)
    expected = scipy.stats.ttest_1samp(values, 0.1, alternative="greater")
    assert p == pytest.approx(expected.pvalue)
    two_sided = scipy.stats.ttest_1samp(values, 0)
    assert interval[1:3] == pytest.approx(tuple(two_sided.confidence_interval()))


def test_strata_have_equal_weight_and_spreads_of_their_own():
    many, few = drawn(1.0, 30, spread=0.5), drawn(2.0, 5, spread=4, seed=1)
    interval, _ = stratified_test([many, few])
    error = math.sqrt(many.var(ddof=1) / 30 + few.var(ddof=1) / 5) / 2
    assert interval.mean == pytest.approx(1.5) and interval.count == 35
    reach = scipy.stats.t.ppf(0.975, 33) * error
    assert interval.high - interval.mean == pytest.approx(reach)


def test_a_stratum_of_one_unit_has_no_spread_and_so_no_test():
    interval, p = stratified_test([[1.0, 2.0], [3.0]])
    assert interval.mean == 2.25 and math.isnan(interval.low) and math.isnan(p)


@pytest.mark.parametrize("strata", [[], [[]], [[1.0, math.nan]]])
def test_missing_values_are_refused(strata):
    with pytest.raises(DataError, match="finite values"):
        stratified_test(strata)


def test_holm_multiplies_the_smallest_by_their_number_and_never_reorders():
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.04, 0.09, 0.09, 1.0])


# Verdicts -------------------------------------------------------------------------


def test_all_six_claims_get_a_row_even_if_nothing_was_measured(tmp_path):
    found = verdicts(tmp_path, planned(1, 0.5))
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found.pop(1) == "supported" and set(found.values()) == {"not measured yet"}


@pytest.mark.parametrize(
    ("mean", "verdict"), [(0.6, "supported"), (-0.6, "contradicted"), (0.05, "undecided")]
)
def test_a_verdict_follows_the_sign_if_chance_is_excluded(tmp_path, mean, verdict):
    assert verdicts(tmp_path, planned(4, mean))[4] == verdict


def test_what_one_test_would_decide_six_together_do_not(tmp_path):
    endpoint = planned(4, 0.0)
    values = endpoint.parts[0].strata[0]
    error = values.std(ddof=1) / math.sqrt(len(values))
    endpoint = planned(4, 2.2 * error)
    _, p = stratified_test(*endpoint.parts[:1][0])
    assert 2 * p < 0.05
    assert verdicts(tmp_path, endpoint)[4] == "undecided"


def test_fewer_units_than_planned_or_another_network_decide_nothing(tmp_path):
    fewer = Endpoint(1, "resnet18", [Part([drawn(9, 64), drawn(9, 32), drawn(9, 15)])])
    found = verdicts(tmp_path, fewer, planned(4, 9, model="convnet16"))
    assert found[1].startswith("pending") and found[4].startswith("pending")


@pytest.mark.parametrize("obstacle", [NOTHING_RECOVERED, NO_FAIR_OPPONENT])
def test_an_obstacle_is_said_in_place_of_a_verdict(tmp_path, obstacle):
    assert verdicts(tmp_path, planned(2, 9, obstacle=obstacle))[2] == obstacle


@pytest.mark.parametrize(
    ("psnr", "ssim", "verdict"),
    [
        (0.2, 0.9, "supported"),  # within the margin, and the score helps
        (0.2, 0.0, "undecided"),  # within the margin, but so it is without the score
        (0.2, -0.9, "contradicted"),
        (1.0, 0.9, "undecided"),  # at the margin
        (-2.5, 0.9, "contradicted"),  # well outside
    ],
)
def test_a_claim_of_several_parts_holds_if_all_do(tmp_path, psnr, ssim, verdict):
    away, gain = drawn(psnr, 32), drawn(ssim, 32, seed=1)
    parts = [Part([away], -1), Part([-away], -1), Part([gain])]
    assert verdicts(tmp_path, planned(5, 0, parts=parts))[5] == verdict


def test_a_margin_shifts_what_counts_as_not_worse(tmp_path):
    values = drawn(-0.1, 48, spread=0.2)
    assert verdicts(tmp_path, planned(2, 0, parts=[Part([values], -0.3)]))[2] == "supported"


# Files ----------------------------------------------------------------------------


def test_saved_numbers_come_back_to_the_last_digit(tmp_path):
    saved = save_findings(
        "03_ablations",
        [planned(1, 1 / 3)],
        [
            comparison(),
            comparison(metric="ssim", difference=Interval(1 / 7, math.nan, math.nan, 1)),
        ],
        tmp_path / "new",
    )
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["03_ablations_comparisons.csv", "03_ablations_endpoints.csv"]
    claims, comparisons = collect_findings(tmp_path / "new")
    pandas.testing.assert_frame_equal(comparisons, saved["comparisons"], check_exact=True)
    assert claims.loc[0, ["mean", "low", "high"]].tolist() == (
        saved["endpoints"].loc[0, ["mean", "low", "high"]].tolist()
    )


def test_two_comparisons_of_the_same_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the same twice: GIPIP − IG, B = 4"):
        save_findings("03_ablations", [], [comparison(), comparison(images=8)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_comparisons_are_collected_by_claim_then_notebook_then_as_saved(tmp_path):
    save_findings("04_g", [], [comparison(1, "d"), comparison(2, "e")], tmp_path)
    save_findings(
        "02_i", [], [comparison(2, "b"), comparison(1, "z"), comparison(1, "a")], tmp_path
    )
    _, comparisons = collect_findings(tmp_path)
    assert comparisons["compared"].tolist() == ["z", "a", "d", "b", "e"]


def test_collecting_again_changes_nothing(tmp_path):
    save_findings("02_inversion", [planned(1, 0.2)], [comparison()], tmp_path)
    collect_findings(tmp_path)
    content = [(tmp_path / name).read_bytes() for name in ("claims.csv", "comparisons.csv")]
    collect_findings(tmp_path)
    assert content == [(tmp_path / name).read_bytes() for name in ("claims.csv", "comparisons.csv")]


def test_where_nothing_was_saved_no_file_is_written(tmp_path):
    claims, comparisons = collect_findings(tmp_path)
    assert set(claims["verdict"]) == {"not measured yet"} and comparisons.empty
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "claim,compared\n1,a\n", "{columns}\n1,a,psnr,4,6,one,0,2\n"])
def test_a_file_that_is_no_table_of_findings_is_named(tmp_path, text):
    columns = "claim,compared,metric,images,count,mean,low,high"
    (tmp_path / "02_x_comparisons.csv").write_text(text.format(columns=columns))
    with pytest.raises(DataError, match=r"02_x_comparisons\.csv is no table .*run its notebook"):
        collect_findings(tmp_path)


# Pages ----------------------------------------------------------------------------


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\nbefore\n\n{START}\nlater\n{END}\n\nafter\n", encoding="utf-8")
    page = tmp_path / "docs" / "claims.md"
    page.parent.mkdir()
    page.write_text(f"# Claims\n{START}\n{END}\n", encoding="utf-8")
    return path


def test_the_readme_shows_six_claims_with_units_difference_and_verdict(tmp_path, readme):
    save_findings("02_inversion", [planned(1, 0.5), planned(4, -0.5)], [], tmp_path)
    assert write_findings(readme, *collect_findings(tmp_path))
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("\n\nafter\n")
    rows = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == 6
    assert "| 64 + 32 + 16 of 64 + 32 + 16 | +0.50 [" in rows[0] and "] dB | supported |" in rows[0]
    assert rows[3].endswith("] | contradicted |") and "| −0.500 [" in rows[3]
    assert rows[1].endswith("| – | – | – | not measured yet |")


def test_the_page_shows_every_comparison_in_its_unit_and_no_verdict(tmp_path, readme):
    comparisons = [
        comparison(difference=Interval(1.567, 0.484, 2.766, 6)),
        comparison(compared="|ΔW| = 1", metric="ssim", difference=Interval(-0.02, -0.04, 0.001, 8)),
        comparison(2, difference=Interval(0.25, math.nan, math.nan, 1)),
    ]
    save_findings("02_inversion", [], comparisons, tmp_path)
    write_findings(readme, *collect_findings(tmp_path))
    lines = (tmp_path / "docs" / "claims.md").read_text(encoding="utf-8").splitlines()
    assert "| GIPIP − IG, B = 4 | psnr | 24 | 6 | +1.57 [+0.48, +2.77] dB |" in lines
    assert "| \\|ΔW\\| = 1 | ssim | 24 | 8 | −0.020 [−0.040, +0.001] |" in lines
    assert "| GIPIP − IG, B = 4 | psnr | 24 | 1 | +0.25 (no interval) dB |" in lines
    assert [line for line in lines if line.startswith("## ")] == [
        "## Primary endpoints",
        *(f"## {number} {STUDY[number].claim}" for number in (1, 2)),
    ]


def test_writing_the_same_again_gives_the_same_bytes_and_new_tables_replace_old(tmp_path, readme):
    save_findings("02_i", [], [comparison(compared=r"a \1 \g<0>")], tmp_path)
    pages = (readme, tmp_path / "docs" / "claims.md")
    write_findings(readme, *collect_findings(tmp_path))
    first = [page.read_bytes() for page in pages]
    write_findings(readme, *collect_findings(tmp_path))
    assert [page.read_bytes() for page in pages] == first
    save_findings("02_i", [], [comparison(compared="new")], tmp_path)
    write_findings(readme, *collect_findings(tmp_path))
    text = pages[1].read_text(encoding="utf-8")
    assert "| new |" in text and r"\g<0>" not in text


@pytest.mark.parametrize(
    "text", ["", "# Title\n", f"{START}\n", f"{END}\n{START}\n", f"As `{START}`\n{END}\n", None]
)
def test_a_readme_without_the_two_lines_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    if text is not None:
        readme.write_text(text)
    assert not write_findings(readme, *collect_findings(tmp_path))
    assert (readme.read_text() if readme.exists() else None) == text

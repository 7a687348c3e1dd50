"""The words that notebooks share: arms, units, comparisons, endpoints, tables, and what ships."""

import numpy
import pandas
import pytest
import torch

from gipip.data.datasets import load_dataset
from gipip.evaluation.references import REFERENCES
from gipip.experiments import arms, endpoints, show
from gipip.experiments.claims import collect_findings, save_findings
from gipip.experiments.results import ASSUMPTIONS, Results
from gipip.experiments.scenario import Run
from gipip.experiments.store import Result
from gipip.priors.autoencoder import load_prior

METRICS = {"psnr": [20.0, 22.0], "ssim": [0.5, 0.7], "ssim_padded": [0.6, 0.8]}
METRICS |= {"lpips": [0.1, 0.2], "identified": [1.0, 0.0], "candidates": [256, 256]}


def result(run: Run, gain: float) -> Result:
    """A made-up result whose PSNR is `gain` dB, and SSIM a hundredth of it, above METRICS."""
    metrics = pandas.DataFrame({"image": [0, 1], "matched": [0, 1], **METRICS})
    metrics["psnr"] += gain
    metrics["ssim"] += gain / 100
    truth = run.scenario.batch().images
    assumptions = dict.fromkeys(set(ASSUMPTIONS) - {"iterations", "machine"}, "made up")
    about = {"assumptions": assumptions, "seconds": 1.0, "returned": "last"}
    about["made"] = {"machine": "none"}
    return Result(run, truth / 2, truth, torch.tensor([0, 1]), {}, metrics, about)


@pytest.fixture(scope="module")
def results() -> Results:
    """Without and with the score, half a dB ahead in every odd batch and 1.5 in every even one."""
    attacks = arms.with_and_without("cifar10/convnet16/B=2", [load_prior()], iterations=1)
    todo = arms.runs(arms.units(6, model="convnet16", batch_size=2), attacks)
    gains = [1.5 - run.scenario.seed % 2 if run.arm == "with" else 0.0 for run in todo]
    return Results(map(result, todo, gains))


# Arms and units -------------------------------------------------------------------


def test_every_arm_attacks_every_unit(results):
    pairs = {(run.run.arm, run.run.scenario.seed) for run in results}
    assert pairs == {(arm, seed) for arm in ("with", "without") for seed in range(6)}
    assert len(results) == 12


def test_client_prior_and_start_vary_over_units_and_arms_share_them():
    priors = arms.three_priors("cifar10")
    todo = arms.equal_tv(arms.units(4, model="convnet16"), priors, iterations=1)
    ours = [run for run in todo if run.arm == "with"]
    assert [run.scenario.model_seed for run in ours] == [0, 1, 2, 0]
    assert [run.attack.seed for run in ours] == [0, 1, 2, 3]
    fingerprints = [prior.fingerprint for prior in priors]
    assert len(set(fingerprints)) == 3
    assert [run.attack.prior.fingerprint for run in ours] == [*fingerprints, fingerprints[0]]
    theirs = [run for run in todo if run.arm == "without"]
    assert [run.scenario for run in theirs] == [run.scenario for run in ours]
    assert [run.attack.seed for run in theirs] == [run.attack.seed for run in ours]


def test_a_decoded_start_changes_nothing_else_of_an_attack():
    pair = arms.with_and_without("cifar10/convnet16/B=1", [load_prior()], iterations=7)
    scenarios = arms.units(1, model="convnet16")
    start = arms.decoded(scenarios, load_dataset("cifar10").auxiliary(0.001), steps=0)
    [with_score] = arms.started(pair, start)["with, decoded start"]
    given, dumped = pair["with"][0].model_dump(), with_score.model_dump()
    shared = (given.keys() & dumped.keys()) - {"prior"}
    assert {name: dumped[name] for name in shared} == {name: given[name] for name in shared}
    assert with_score.score.fingerprint == pair["with"][0].prior.fingerprint
    assert with_score.prior.fingerprint == start[0].prior.fingerprint
    assert (dumped["feature_weight"], dumped["pull_weight"]) == (0, 0)
    [without] = arms.started(pair, start)["without, decoded start"]
    assert without.score is None


def test_sources_of_auxiliary_images_hold_what_their_names_say():
    found = arms.sources([0.001, 0.01], count=20)
    sizes = {name: len(images) for name, images in found.items()}
    named = {"0.1 %": 50, "1 %": 500, "animals only": 20, "vehicles only": 20}
    assert sizes == named | {"generated photos": 20}
    assert {*found["vehicles only"].labels.tolist()} <= {0, 1, 8, 9}
    assert all(images.images.shape[1:] == (3, 32, 32) for images in found.values())


def test_without_photographs_the_attacker_enlarges_other_images():
    own, enlarged = (arms.auxiliary_images(name) for name in ("cifar10", "imagenet64"))
    assert own.fingerprint == load_dataset("cifar10").auxiliary().fingerprint
    small = torch.nn.functional.avg_pool2d(enlarged.images[:50], 2)
    assert enlarged.images.shape[1:] == (3, 64, 64)
    assert (small - own.images[:50]).abs().mean() < 0.03


def test_features_of_an_undefended_batch_are_recovered_exactly():
    table = arms.recovery(arms.units(1, model="convnet16", batch_size=4))
    assert table["status"].tolist() == ["exact"] and table["batch size"].tolist() == [4]
    assert float(table["largest relative error"][0]) < 1e-4


def test_trained_clients_have_no_seed_of_their_weights():
    assert {scenario.model_seed for scenario in arms.units(3, model="convnet16", epochs=40)} == {0}


def test_with_and_without_differ_in_the_anomaly_score_only():
    pair = arms.with_and_without("cifar10/convnet16/B=1", [load_prior()], iterations=7)
    [ours] = pair["with"]
    without, dumped = pair["without"].model_dump(), ours.model_dump()
    assert {name: dumped[name] for name in without} == without
    assert dumped["as_weight"] > 0 and ours.prior.offset == 0


def test_each_scenario_gets_the_weights_of_its_own_condition():
    scenarios = [*arms.units(1, model="convnet16")]
    scenarios += arms.units(1, model="convnet16", batch_size=8)
    weights = [run.attack.tv_weight for run in arms.equal_tv(scenarios, [load_prior()])]
    expected = [
        arms.with_and_without(scenario.condition, [])["without"].tv_weight for scenario in scenarios
    ]
    assert weights == [expected[0]] * 2 + [expected[1]] * 2


# Comparisons ----------------------------------------------------------------------


def test_arms_are_compared_by_the_paired_difference_in_each_condition(results):
    psnr, ssim = arms.compare_arms(results, 1, "GIPIP − IG", "with", "without")
    assert (psnr.compared, psnr.metric, psnr.images) == ("GIPIP − IG, convnet16, B = 2", "psnr", 12)
    assert psnr.difference.mean == pytest.approx(1.0) and psnr.difference.count == 6
    assert psnr.about == 1 and ssim.difference.mean == pytest.approx(0.01)


def test_a_loss_is_compared_with_another_loss(results):
    more, less = ("with", "without"), ("without", "with")
    psnr, _ = arms.compare_losses(results, 3, "losses", more, less)
    assert psnr.difference.mean == pytest.approx(2.0) and psnr.images == 12


def test_the_papers_number_is_what_a_mean_is_compared_with(results):
    compared = arms.compare_with_paper(results, "with − 16.12 dB", "without")
    assert compared.difference.mean == pytest.approx(21 - 16.12)


# Endpoints ------------------------------------------------------------------------

PAIR = ("with", "without")


def test_a_claim_about_batch_sizes_has_a_stratum_for_each(results):
    endpoint = endpoints.improvement(results, PAIR)
    [part] = endpoint.parts
    assert [list(values) for values in part.strata] == [[1.5, 0.5] * 3]
    assert (endpoint.number, endpoint.model, endpoint.obstacle) == (1, "convnet16", "")
    assert endpoint.row()["units"] == "6 of 64 + 32 + 16"


def test_what_does_not_beat_the_mean_image_by_a_decibel_is_nothing_recovered(results):
    assert endpoints.obstacle(results, "without") == ""
    worse = Results(result(each.run, -10.0) for each in results)
    assert endpoints.obstacle(worse, "with") == endpoints.NOTHING_RECOVERED


def test_a_rival_that_does_not_beat_what_has_no_data_is_no_fair_opponent(results):
    assert endpoints.fair_opponent(results, *PAIR) == ""
    unfair = endpoints.fair_opponent(results, *PAIR[::-1])
    assert endpoints.not_worse(results, PAIR, unfair).row()["obstacle"] == unfair != ""


def test_losses_of_all_groups_are_pooled(results):
    endpoint = endpoints.smaller_loss([results, results], PAIR, PAIR[::-1], "")
    assert list(endpoint.parts[0].strata[0]) == [3.0, 1.0] * 6


def test_conditions_in_which_nothing_is_recovered_do_not_count(results):
    nothing = Results([result(each.run, -15.0) for each in results])
    kept = endpoints.stronger_threat([results, nothing], PAIR)
    assert kept.parts[0].strata[0] == pytest.approx([0.015, 0.005] * 3) and not kept.obstacle
    none = endpoints.stronger_threat([nothing], PAIR)
    assert none.obstacle == endpoints.NOTHING_RECOVERED


def test_the_headline_is_an_equivalence_and_a_gain(results):
    low, high, gain = endpoints.headline(results, PAIR).parts
    assert low.strata[0] == pytest.approx(numpy.array([6.38, 5.38] * 3)) and low.above == -1
    assert high.strata[0] == pytest.approx(-low.strata[0]) and high.above == -1
    assert gain.strata[0] == pytest.approx([0.015, 0.005] * 3)


# Tables, pictures, checks ---------------------------------------------------------


def test_references_are_further_arms_that_assume_nothing(results):
    frame = show.with_references(results)
    assert list(frame["arm"].unique()) == ["without", "with", *REFERENCES]
    of_reference = frame[frame["arm"] == "mean image"]
    assert len(of_reference) == 12 and set(of_reference["labels"]) == {show.NOTHING}
    assert of_reference["psnr"].between(5, 20).all()


def test_the_table_has_a_row_an_arm_and_says_once_what_all_share(results, capsys):
    table = show.quality(show.with_references(results))
    assert table["attack"].tolist() == ["without", "with", *REFERENCES]
    assert table["PSNR (dB)"].tolist()[:1] == ["21.000 [21.000, 21.000]"]
    assert "labels: made up" in capsys.readouterr().out and "labels" not in table


def test_references_become_lines_of_a_chart(results):
    frame = show.with_references(results)
    figure = show.dots(frame, "batch_size", "psnr")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert set(REFERENCES) <= set(texts)
    levels = frame[frame["arm"].isin(REFERENCES)].groupby("arm")["psnr"].mean()
    dashed = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert sorted(dashed) == pytest.approx(sorted(levels))


def test_a_column_that_says_the_same_in_every_row_moves_to_the_caption(capsys):
    table = show.captioned(pandas.DataFrame({"attack": ["a", "b"], "images": [8, 8]}))
    assert list(table) == ["attack"] and "images: 8" in capsys.readouterr().out


def test_a_table_of_one_row_keeps_its_columns(capsys):
    assert list(show.captioned(pandas.DataFrame({"attack": ["a"]}))) == ["attack"]
    assert not capsys.readouterr().out.strip()


def test_labelled_frames_say_where_each_row_is_from(results):
    named = {name: results.select(arm=name) for name in ("without", "with")}
    frame = show.labelled("condition", named)
    own = frame[~frame["arm"].isin(REFERENCES)]
    assert (own["condition"] == own["arm"]).all() and len(own) == 24


def test_a_table_says_once_that_single_batches_have_no_interval(capsys):
    frame = pandas.DataFrame({"psnr": ["13.5 (no interval)", "14.0 [13.0, 15.0]"]})
    table = show.captioned(frame)
    assert table["PSNR (dB)"].tolist() == ["13.5", "14.0 [13.0, 15.0]"]
    assert capsys.readouterr().out == "without an interval: means over a single batch\n"


def test_pictures_of_many_attacks_stand_side_by_side_under_their_names(results):
    figure = show.pictures({"all": results, "one": results[:1]}, columns=4)
    assert [axes.get_title() for axes in figure.axes][:3] == ["private", "all", "one"]
    below = [axes.get_xlabel() for axes in figure.axes]
    assert below == ["", "20.0 dB", "20.0 dB", "", "22.0 dB", "22.0 dB"]


def test_pictures_of_few_attacks_stand_below_each_other(results):
    figure = show.pictures({"one": results[:1]})
    assert [axes.get_ylabel() for axes in figure.axes] == ["private", "", "one", ""]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "20.0 dB", "22.0 dB"]


def test_words_that_all_comparisons_begin_with_are_on_the_axis(results):
    found = arms.compare_arms(results, 1, "GIPIP − IG, equal λTV", "with", "without")
    found += arms.compare_arms(results, 1, "GIPIP − IG, tuned", "with", "without")
    figure = show.forest(found, "psnr")
    assert figure.axes[0].get_xlabel().startswith("PSNR (dB): GIPIP − IG\n")
    assert figure.data_drawn["effect"].tolist() == [
        "equal λTV, convnet16, B = 2",
        "tuned, convnet16, B = 2",
    ]


@pytest.mark.parametrize(
    ("kind", "strength", "label"),
    [
        ("noise", 0.01, "noise 0.01"),
        ("sparsity", 0.95, "sparsity 0.95"),
        ("Soteria", 0.5, "Soteria 50 %"),
        ("DP-SGD", 0.1, "DP-SGD C=1 σ=0.1"),
    ],
)
def test_a_defence_is_named_as_in_tables(kind, strength, label):
    assert str(arms.defended(kind, strength)) == label


def test_auroc_of_noise_is_nearly_perfect():
    natural = load_dataset("cifar10").tuning_pool[:20].images
    noise = torch.rand(natural.shape, generator=torch.Generator().manual_seed(0))
    table = show.aurocs({"c = 0": load_prior().with_offset(0)}, natural, {"noise": noise})
    assert table.loc[0, ["anomaly", "images"]].tolist() == ["noise", 20]
    assert table["c = 0"].item() > 0.95


def test_a_claim_that_does_not_hold_is_named(capsys):
    show.check("two is more than one", 2 > 1)
    assert capsys.readouterr().out == "two is more than one\n"
    with pytest.raises(AssertionError, match="one is more than two"):
        show.check("one is more than two", 1 > 2)


def test_frames_keep_what_a_watcher_sees():
    frames = show.Frames()
    frames(25, torch.zeros(1, 3, 8, 8), 0.5)
    assert list(frames.images) == [25]


def test_findings_are_written_and_shown_with_their_intervals(results, tmp_path):
    found = arms.compare_arms(results, 1, "a − b", "with", "without")
    table = show.findings("02_x", [endpoints.improvement(results, PAIR)], found, tmp_path)
    assert table[["PSNR (dB)", "SSIM"]].map(lambda text: text.startswith("+")).all(axis=None)
    claims, comparisons = collect_findings(tmp_path)
    assert len(comparisons) == 2 and claims.loc[0, "model"] == "convnet16"


def test_what_the_full_run_found_is_read_from_where_its_figures_are(
    results, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(show, "FIGURES", tmp_path)
    assert show.found("02_x_comparisons") is None
    assert "figures/02_x_comparisons.csv is in the repository" in capsys.readouterr().out
    found = arms.compare_arms(results, 1, "a − b", "with", "without")
    save_findings("02_x", [], found, tmp_path)
    assert show.found("02_x_comparisons")["SSIM"].str.startswith("+").all()


@pytest.mark.parametrize(
    "name",
    [
        "00_emerging",
        "01_auroc",
        "02_inversion_comparisons",
        "03_ablations_comparisons",
        "04_generalization_comparisons",
        "05_defenses_comparisons",
        "06_imagenet64_comparisons",
    ],
)
def test_the_full_run_of_every_notebook_ships_with_the_repository(name):
    assert len(show.found(name)) > 0

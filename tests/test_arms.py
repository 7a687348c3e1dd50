"""The words that notebooks share: arms, conditions, claims, tables, and what ships with them."""

import pandas
import pytest
import torch

from gipip.data.datasets import load_dataset
from gipip.experiments import arms, show
from gipip.experiments.claims import collect_claims, save_claims
from gipip.experiments.results import Results
from gipip.experiments.scenario import Run
from gipip.experiments.store import Result
from gipip.priors.autoencoder import load_prior

METRICS = {"psnr": [20.0, 22.0], "ssim": [0.5, 0.7], "lpips": [0.1, 0.2]}


def result(run: Run, gain: float) -> Result:
    """A made-up result whose PSNR is `gain` dB, and SSIM a hundredth of it, above METRICS."""
    metrics = pandas.DataFrame({"image": [0, 1], "matched": [0, 1], **METRICS})
    metrics["psnr"] += gain
    metrics["ssim"] += gain / 100
    images = torch.full((2, 3, 32, 32), 0.5)
    about = {"assumptions": {}, "seconds": 1.0, "returned": "last", "made": {"machine": "none"}}
    return Result(run, images, images / 2, torch.tensor([0, 1]), {}, metrics, about)


@pytest.fixture(scope="module")
def results() -> Results:
    """IG and GIPIP, half a dB ahead in every odd batch and 1.5 in every even one."""
    attacks = arms.with_and_without("cifar10/convnet16/B=2", load_prior(), iterations=1)
    todo = arms.runs(arms.first_batches(6, model="convnet16", batch_size=2), attacks)
    gains = [1.5 - run.scenario.seed % 2 if run.arm == "with" else 0.0 for run in todo]
    return Results(map(result, todo, gains))


def test_every_arm_attacks_every_scenario(results):
    pairs = {(run.run.arm, run.run.scenario.seed) for run in results}
    assert pairs == {(arm, seed) for arm in ("with", "without") for seed in range(6)}
    assert len(results) == 12


def test_with_and_without_differ_in_the_anomaly_score_only():
    pair = arms.with_and_without("cifar10/convnet16/B=1", load_prior(), iterations=7)
    without, ours = (attack.model_dump() for attack in (pair["without"], pair["with"]))
    assert {name: ours[name] for name in without} == without
    assert ours["as_weight"] > 0 and pair["with"].prior.offset == 0


def test_each_scenario_gets_the_weights_of_its_own_condition():
    scenarios = [*arms.first_batches(1, model="convnet16")]
    scenarios += arms.first_batches(1, model="convnet16", batch_size=8)
    weights = [run.attack.tv_weight for run in arms.equal_tv(scenarios, load_prior())]
    expected = [
        arms.with_and_without(scenario.condition, load_prior())["without"].tv_weight
        for scenario in scenarios
    ]
    assert weights == [expected[0]] * 2 + [expected[1]] * 2


def test_a_claim_is_judged_by_the_paired_difference_in_each_condition(results):
    psnr, ssim = arms.judge(results, 1, "GIPIP − IG", "with", "without")
    assert (psnr.compared, psnr.metric, psnr.images) == ("GIPIP − IG, convnet16, B = 2", "psnr", 12)
    assert psnr.difference.mean == pytest.approx(1.0) and psnr.difference.count == 6
    assert psnr.claim == arms.CLAIMS[0] and psnr.verdict == "supported"
    assert ssim.difference.mean == pytest.approx(0.01)


def test_a_loss_is_judged_against_another_loss(results):
    more, less = ("with", "without"), ("without", "with")
    psnr, _ = arms.judge_losses(results, 3, "losses", more, less)
    assert psnr.difference.mean == pytest.approx(2.0) and psnr.images == 12


def test_a_column_that_says_the_same_in_every_row_moves_to_the_caption(capsys):
    table = show.captioned(pandas.DataFrame({"attack": ["a", "b"], "images": [8, 8]}))
    assert list(table) == ["attack"] and "images: 8" in capsys.readouterr().out


def test_a_table_of_one_row_keeps_its_columns(capsys):
    assert list(show.captioned(pandas.DataFrame({"attack": ["a"]}))) == ["attack"]
    assert not capsys.readouterr().out.strip()


def test_labelled_frames_say_where_each_row_is_from(results):
    named = {name: results.select(arm=name) for name in ("without", "with")}
    frame = show.labelled("condition", named)
    assert (frame["condition"] == frame["arm"]).all() and len(frame) == 24


def test_pictures_show_what_all_rows_have(results):
    figure = show.pictures({"all": results, "one": results[:1]}, columns=4)
    assert figure.data_drawn["caption"].tolist()[2:] == ["20.0 dB", "22.0 dB"] * 2


def test_words_that_all_comparisons_begin_with_are_on_the_axis(results):
    claims = arms.judge(results, 1, "GIPIP − IG, equal λTV", "with", "without")
    claims += arms.judge(results, 1, "GIPIP − IG, tuned", "with", "without")
    figure = show.forest(claims, "psnr")
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


def test_a_constant_picture_of_a_constant_image_is_as_good_as_it_gets():
    images = load_dataset("cifar10").private_pool[:2].images
    constant = torch.full_like(images, 0.5) + torch.linspace(-0.1, 0.1, 32)
    assert show.flat_psnr(constant) > 20 > show.flat_psnr(images)


def test_auroc_of_noise_is_nearly_perfect():
    natural = load_dataset("cifar10").tuning_pool[:20].images
    noise = torch.rand(natural.shape, generator=torch.Generator().manual_seed(0))
    table = show.aurocs({"c = 0": load_prior().with_offset(0)}, natural, {"noise": noise})
    assert table.loc[0, ["prior", "anomaly", "images"]].tolist() == ["c = 0", "noise", 20]
    assert table["AUROC"].item() > 0.95


def test_a_claim_that_does_not_hold_is_named(capsys):
    show.check("two is more than one", 2 > 1)
    assert capsys.readouterr().out == "two is more than one\n"
    with pytest.raises(AssertionError, match="one is more than two"):
        show.check("one is more than two", 1 > 2)


def test_frames_keep_what_a_watcher_sees():
    frames = show.Frames()
    frames(25, torch.zeros(1, 3, 8, 8), 0.5)
    assert list(frames.images) == [25]


def test_verdicts_are_written_and_shown_with_their_intervals(results, tmp_path):
    table = show.verdicts("02_x", arms.judge(results, 1, "a − b", "with", "without"), tmp_path)
    assert table["difference"].str.match(r"\+\d\.\d{3} \[").all()
    assert len(collect_claims(tmp_path)) == 2


def test_what_the_full_run_found_is_read_from_where_its_figures_are(
    results, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(show, "FIGURES", tmp_path)
    assert show.found("02_x_claims") is None
    assert "figures/02_x_claims.csv is in the repository" in capsys.readouterr().out
    save_claims("02_x", arms.judge(results, 1, "a − b", "with", "without"), tmp_path)
    assert show.found("02_x_claims")["difference"].str.startswith("+").all()


@pytest.mark.parametrize(
    "name",
    ["00_emerging", "01_auroc"]
    + [
        f"{notebook}_claims"
        for notebook in (
            "02_inversion",
            "03_ablations",
            "04_generalization",
            "05_defenses",
            "06_imagenet64",
        )
    ],
)
def test_the_full_run_of_every_notebook_ships_with_the_repository(name):
    assert len(show.found(name)) > 0

"""Attacks and sweeps that are out of time, and go on another time as if nothing had
happened.
"""

import re
import time

import distributed
import pytest
import torch

import gipip
from gipip.attacks import checkpoints
from gipip.attacks.checkpoints import Checkpoint
from gipip.errors import OutOfTime
from gipip.experiments import sweep as experiments
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.store import ResultStore
from gipip.experiments.sweep import execute, sweep
from gipip.files import read_metadata
from gipip.priors import GenerativePrior, Generator
from gipip.progress import time_limit

LENET = Scenario(model="lenet")


@pytest.fixture
def generator():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GenerativePrior(Generator(width=4, latent_size=8))


class Clock:
    """Moves on by a second with every step of an attack."""

    now = 0
    perf_counter = staticmethod(time.perf_counter)

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock, step = Clock(), gipip.Attack._step

    def counted(self, *arguments):
        clock.now += 1
        return step(self, *arguments)

    monkeypatch.setattr(gipip.Attack, "_step", counted)
    monkeypatch.setattr(checkpoints, "time", clock)
    return clock


@pytest.fixture(scope="module")
def lenet():
    return gipip.build_model("lenet")


@pytest.fixture(scope="module")
def update(lenet):
    return gipip.Client(lenet).share(gipip.load_dataset("cifar10").tuning())


def _attack(name, generator):
    return {
        "GIPIP": lambda: gipip.GIPIP(prior=gipip.load_prior(), iterations=30),
        "GIPIP in steps": lambda: gipip.GIPIP(
            prior=gipip.load_prior(), iterations=30, schedule="steps", signed=False
        ),
        "IG": lambda: gipip.InvertingGradients(iterations=9, restarts=3, returns="lowest_cost"),
        "GIAS": lambda: gipip.GIAS(
            prior=generator, iterations=9, latent_iterations=7, latent_restarts=2, restarts=2
        ),
    }[name]()


def in_pieces(attack, model, update, path, clock, steps, **options):
    """The attack, paused after so many steps again and again, and how many pieces it took."""
    for piece in range(1, 20):
        try:
            return attack(
                model, update, checkpoint=Checkpoint(path, deadline=clock.now + steps), **options
            ), piece
        except OutOfTime:
            pass
    raise AssertionError("it never ends")


def assert_same_bits(found, expected):
    assert torch.equal(found.images, expected.images)
    assert list(found.history) == list(expected.history)
    assert all(torch.equal(terms, expected.history[term]) for term, terms in found.history.items())
    assert (found.cost, found.restart_costs, found.notes) == (
        expected.cost,
        expected.restart_costs,
        expected.notes,
    )


@pytest.mark.parametrize("name", ["GIPIP", "GIPIP in steps", "IG", "GIAS"])
def test_an_attack_in_pieces_gives_the_bits_of_an_uninterrupted_one_and_repeats_no_step(
    name, generator, lenet, update, clock, tmp_path
):
    attack, options = _attack(name, generator), {"together": 1}
    whole = attack(lenet, update, **options)
    steps = clock.now
    found, pieces = in_pieces(attack, lenet, update, tmp_path / "key", clock, steps=10, **options)
    assert clock.now == 2 * steps and pieces == -(-steps // 10)
    assert_same_bits(found, whole)


def test_an_attack_in_train_mode_goes_on_with_the_same_bits(clock, tmp_path):
    model, attack = (
        gipip.build_model("convnet16"),
        gipip.GradInversion(iterations=9, schedule="steps"),
    )
    batch = gipip.load_dataset("cifar10").tuning(batch_size=2)
    update = gipip.Client(model).share(batch, mode="train", statistics="shared")
    found, pieces = in_pieces(attack, model, update, tmp_path / "key", clock, steps=5)
    assert pieces == 2
    assert_same_bits(found, attack(model, update))


def test_restarts_computed_at_once_pause_and_go_on_together(lenet, update, clock, tmp_path):
    attack = gipip.InvertingGradients(iterations=8, restarts=3)
    found, pieces = in_pieces(attack, lenet, update, tmp_path / "key", clock, steps=6, together=2)
    assert pieces == 3
    assert_same_bits(found, attack(lenet, update, together=2))


def test_an_attempt_whose_cost_is_not_finite_ends_at_the_same_iteration_in_pieces(
    lenet, update, clock, tmp_path
):
    attack = gipip.InvertingGradients(iterations=50, tv_weight=3e38, restarts=2)
    with pytest.warns(UserWarning, match="not finite"):
        whole = attack(lenet, update, together=1)
    with pytest.warns(UserWarning, match="not finite"):
        found, pieces = in_pieces(
            attack, lenet, update, tmp_path / "key", clock, steps=1, together=1
        )
    assert pieces == 2 and clock.now == 4
    assert found.notes == whole.notes and torch.equal(found.images, whole.images)
    assert (
        [len(terms) for terms in found.history.values()]
        == [len(terms) for terms in whole.history.values()]
        == [2, 2]
    )


def test_dlg_cannot_pause_and_runs_to_its_end(lenet, update, tmp_path):
    found = gipip.DLG(iterations=2)(
        lenet, update, checkpoint=Checkpoint(tmp_path / "key", deadline=0)
    )
    assert len(found.history["gradient matching"]) == 3 and not list(tmp_path.iterdir())


def test_a_state_is_kept_every_few_minutes_so_a_killed_machine_loses_little(
    lenet, update, clock, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoints, "_EVERY", 10)
    attack = gipip.InvertingGradients(iterations=25)
    with monkeypatch.context() as patched:
        patched.setattr(
            gipip.InvertingGradients, "project", _dies_after(15, gipip.InvertingGradients.project)
        )
        with pytest.raises(MemoryError):
            attack(lenet, update, checkpoint=Checkpoint(tmp_path / "key"))
    assert clock.now == 16 and read_metadata(tmp_path / "key-0.safetensors")["steps"] == 10
    found = attack(lenet, update, checkpoint=Checkpoint(tmp_path / "key"))
    assert clock.now == 16 + 15
    assert_same_bits(found, attack(lenet, update))


def _dies_after(steps, project):
    left = iter(range(steps))

    def dying(self, view, variables):
        if next(left, None) is None:
            raise MemoryError
        project(self, view, variables)

    return dying


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def exchange(path):
    model = gipip.build_model("lenet")
    update = gipip.Client(model).share(gipip.load_dataset("cifar10").tuning(batch_size=3))
    gipip.InvertingGradients(iterations=2)(
        model, update, checkpoint=Checkpoint(path.with_name("other"))
    )
    path.write_bytes(path.with_name("other-0.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [cut, exchange])
def test_a_damaged_checkpoint_is_reported_and_set_aside_and_the_attempt_begins_anew(
    damage, lenet, update, clock, tmp_path
):
    attack = gipip.InvertingGradients(iterations=12)
    with pytest.raises(OutOfTime, match="paused after 5 iterations"):
        attack(lenet, update, checkpoint=Checkpoint(tmp_path / "key", deadline=5))
    damage(tmp_path / "key-0.safetensors")
    damaged = (tmp_path / "key-0.safetensors").read_bytes()
    with pytest.warns(
        UserWarning, match="key-0.safetensors.*set aside as key-0.damaged-.* begins anew"
    ):
        found = attack(lenet, update, checkpoint=Checkpoint(tmp_path / "key"))
    assert [path.read_bytes() for path in tmp_path.glob("*.damaged-*")] == [damaged]
    assert_same_bits(found, attack(lenet, update))


# Runs and sweeps ---------------------------------------------------------------


class UsesUpItsTime(gipip.InvertingGradients):
    """An attack that is out of time after its first step, if its time is limited."""

    def project(self, view, variables):
        super().project(view, variables)
        if time_limit() < float("inf"):
            time.sleep(max(0, time_limit() - time.time()))


def runs(iterations, attack=gipip.InvertingGradients):
    return [
        Run("IG", Scenario(model="lenet", seed=seed), attack(iterations=iterations))
        for seed in range(3)
    ]


def limit_time(monkeypatch, seconds=3):
    monkeypatch.setenv("GIPIP_DEADLINE", str(time.time() + seconds))


def unfinished(store):
    return sorted(path.name for path in (store.folder / "unfinished").glob("*"))


def test_a_paused_run_is_kept_below_its_store_until_its_result_is_there(tmp_path, monkeypatch):
    store, run = ResultStore(tmp_path), runs(20, UsesUpItsTime)[0]
    limit_time(monkeypatch)
    with pytest.raises(OutOfTime, match="paused after 1 iterations"):
        execute(run, store)
    monkeypatch.delenv("GIPIP_DEADLINE")
    assert unfinished(store) == [f"{run.key()}-0.safetensors"] and store.load(run) is None
    before = read_metadata(store.folder / "unfinished" / f"{run.key()}-0.safetensors")["seconds"]
    result = execute(run, store)
    assert result.details["seconds"] > before > 0
    assert unfinished(store) == []
    assert torch.equal(result.images, execute(run).images) and torch.equal(
        store.load(run).images, result.images
    )


def test_out_of_time_no_run_begins_and_stored_results_are_still_loaded(tmp_path, monkeypatch):
    store, [run, other, _] = ResultStore(tmp_path), runs(iterations=1)
    execute(run, store)
    limit_time(monkeypatch, seconds=0)
    monkeypatch.setattr(gipip.InvertingGradients, "__call__", None)
    assert execute(run, store).run == run and len(sweep([run], store=store)) == 1
    with pytest.raises(OutOfTime, match="The time is over"):
        execute(other, store)
    with pytest.raises(OutOfTime, match="1 of 2 runs are finished, 1 are left"):
        sweep([run, other, other], store=store)


@pytest.fixture
def scheduler():
    with distributed.LocalCluster(
        1, threads_per_worker=1, processes=False, dashboard_address=":0"
    ) as cluster:
        yield cluster.scheduler_address


def test_a_sweep_pauses_at_the_deadline_and_the_same_call_goes_on(
    tmp_path, scheduler, monkeypatch, capfd
):
    store, todo = ResultStore(tmp_path), runs(20, UsesUpItsTime)
    execute(todo[0], store)
    limit_time(monkeypatch)
    with pytest.raises(OutOfTime, match="1 of 3 runs are finished, 2 are left"):
        sweep(todo, store=store, scheduler=scheduler)
    assert len(unfinished(store)) == 1, "one was under way, and the third did not begin"
    monkeypatch.delenv("GIPIP_DEADLINE")
    results = sweep(todo, store=store, scheduler=scheduler)
    assert unfinished(store) == []
    assert torch.equal(results[1].images, execute(todo[1]).images)
    assert re.findall(
        "^attacks: 2 to compute, about .* with 1 worker$", capfd.readouterr().err, re.MULTILINE
    )


# The expected time -------------------------------------------------------------


def expected(runs, store, scheduler):
    with distributed.Client(scheduler) as client:
        return experiments._forecast(client, runs, store, {})


def stored(store, run, seconds):
    result = execute(run)
    result.details["seconds"] = seconds
    store.save(result)


def test_the_expected_time_is_by_what_iterations_of_the_kind_took_on_this_machine(
    tmp_path, scheduler, monkeypatch
):
    store = ResultStore(tmp_path)
    for run, seconds in zip(
        runs(iterations=2), (1, 2, 30), strict=True
    ):  # the median is a second an iteration
        stored(store, run, seconds)
    monkeypatch.setattr(experiments, "_seconds_a_step", None)
    assert (
        expected(runs(iterations=50), store, scheduler)
        == "attacks: 3 to compute, about 2 minutes with 1 worker"
    )
    other = Run("GI-PIP", LENET, gipip.GIPIP(prior=gipip.load_prior(), iterations=5))
    line = "attacks: 4 to compute, about 30 seconds with 1 worker, and the time of 1 of kinds not timed here before"
    assert expected([*runs(iterations=10), other], store, scheduler) == line
    monkeypatch.setattr(experiments, "provenance", lambda: {"machine": "another"})
    assert (
        expected([other], store, scheduler)
        == "attacks: 1 to compute, of kinds not timed here before"
    )


def test_what_is_done_of_a_run_is_not_expected_again(tmp_path, scheduler, monkeypatch):
    store, [run, other, _] = ResultStore(tmp_path), runs(5, UsesUpItsTime)
    stored(store, other, seconds=50)
    limit_time(monkeypatch)
    with pytest.raises(OutOfTime):
        execute(run, store)
    assert (
        expected([run], store, scheduler) == "attacks: 1 to compute, about 40 seconds with 1 worker"
    )


def test_long_runs_of_a_new_kind_are_timed_by_their_first_iterations(tmp_path, scheduler):
    line = expected(runs(iterations=10**6), ResultStore(tmp_path), scheduler)
    hours = float(
        re.fullmatch(r"attacks: 3 to compute, about ([\d.]+) hours with 1 worker", line)[1]
    )
    assert 0.1 < hours < 1000 and unfinished(ResultStore(tmp_path)) == []


def test_timing_takes_at_most_a_tenth_of_the_time_there_is(tmp_path, scheduler, monkeypatch):
    monkeypatch.setenv("GIPIP_DEADLINE", str(time.time() + 1_000))
    monkeypatch.setattr(
        experiments, "_seconds_a_step", lambda run, limit: (limit - time.time()) / 10**6
    )
    assert (
        expected(runs(iterations=10**6), ResultStore(tmp_path), scheduler)
        == "attacks: 3 to compute, about 5 minutes with 1 worker"
    )


def test_timing_ends_at_its_limit(monkeypatch):
    run, seen = runs(iterations=10**6)[0], []
    monkeypatch.setattr(
        Scenario,
        "client_model",
        lambda self, build=Scenario.client_model: seen.append(self) or build(self),
    )
    assert experiments._seconds_a_step(run, limit=0) is None and not seen
    assert experiments._seconds_a_step(run, limit=float("inf")) > 0
    moments = iter([0, 0, 2])  # when it begins, and after four and eight iterations
    monkeypatch.setattr(experiments.time, "time", lambda: next(moments))
    assert experiments._seconds_a_step(run, limit=1) > 0

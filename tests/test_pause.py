"""Runs and sweeps that are out of time, and go on another time as if nothing had happened."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.errors import OutOfTime
from gipip.experiments import scenario as scenarios
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.store import ResultStore
from gipip.experiments.sweep import execute, sweep
from gipip.files import read_tensors
from gipip.progress import time_limit


class UsesUpItsTime(InvertingGradients):
    """An attack that is out of time after its first step, if its time is limited."""

    def project(self, view, variables):
        super().project(view, variables)
        if time_limit() < float("inf"):
            time.sleep(max(0, time_limit() - time.time()))


def three_runs(attack):
    return [Run("IG", Scenario(model="lenet", seed=seed), attack) for seed in range(3)]


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path)


@pytest.fixture
def limit_time(monkeypatch):
    return lambda seconds: monkeypatch.setenv("GIPIP_DEADLINE", str(time.time() + seconds))


def unfinished(store):
    return sorted(path.name for path in (store.folder / "unfinished").glob("*"))


def test_a_paused_run_is_kept_below_its_store_until_its_result_is_there(
    store, limit_time, monkeypatch
):
    run = three_runs(UsesUpItsTime(iterations=20))[0]
    limit_time(seconds=3)
    with pytest.raises(OutOfTime, match="paused after 1 of 20 iterations"):
        execute(run, store)
    monkeypatch.delenv("GIPIP_DEADLINE")
    assert unfinished(store) == [f"{run.key()}-1.safetensors"] and store.load(run) is None
    _, about = read_tensors(store.folder / "unfinished" / f"{run.key()}-1.safetensors")
    result = execute(run, store)
    assert result.details["seconds"] > about["seconds"] > 0
    assert unfinished(store) == []
    assert torch.equal(result.images, execute(run).images)
    assert torch.equal(store.load(run).images, result.images)


@pytest.fixture
def paused(store, limit_time, monkeypatch):
    """A run that was paused."""
    run = three_runs(UsesUpItsTime(iterations=20))[0]
    limit_time(seconds=1)
    with pytest.raises(OutOfTime):
        execute(run, store)
    monkeypatch.delenv("GIPIP_DEADLINE")
    return run


def test_a_paused_run_of_another_is_not_taken_for_its_own(store, paused):
    other = three_runs(UsesUpItsTime(iterations=20))[1]
    file = store.folder / "unfinished" / f"{paused.key()}-1.safetensors"
    file.rename(file.with_name(f"{other.key()}-1.safetensors"))
    with pytest.warns(UserWarning, match="the state of another attack.*set aside"):
        found = execute(other, store)
    assert torch.equal(found.images, execute(other).images)


def test_what_other_code_began_is_not_gone_on_with(store, paused, monkeypatch):
    first = unfinished(store)
    monkeypatch.setattr(scenarios, "code_version", lambda attack: "of other code")
    assert execute(paused, store).run == paused
    assert unfinished(store) == first


def test_out_of_time_no_run_begins_and_stored_results_are_still_loaded(
    store, limit_time, monkeypatch
):
    run, other, _ = three_runs(InvertingGradients(iterations=1))
    execute(run, store)
    limit_time(seconds=0)
    monkeypatch.setattr(InvertingGradients, "__call__", None)
    assert execute(run, store).run == run and len(sweep([run], store=store)) == 1
    with pytest.raises(OutOfTime, match="The time is over"):
        execute(other, store)
    with pytest.raises(OutOfTime, match="1 of 2 runs are finished, 1 are left"):
        sweep([run, other, other], store=store)


def test_a_sweep_pauses_at_the_deadline_and_the_same_call_goes_on(store, limit_time, monkeypatch):
    runs = three_runs(UsesUpItsTime(iterations=20))
    execute(runs[0], store)
    limit_time(seconds=3)
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(OutOfTime, match="1 of 3 runs are finished, 2 are left"):
            sweep(runs, store=store, executor=executor)
        assert len(unfinished(store)) == 1, "one was under way, and the third did not begin"
        monkeypatch.delenv("GIPIP_DEADLINE")
        results = sweep(runs, store=store, executor=executor)
    assert unfinished(store) == []
    assert torch.equal(results[1].images, execute(runs[1]).images)

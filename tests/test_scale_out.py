"""Sweeps: what they compute and what not, in processes of this machine and on a dask cluster, some
of which are killed.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.errors import BatchSizeError, DataError, ModelError, StoreError, SweepError
from gipip.experiments.pool import Processes
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.store import ResultStore
from gipip.experiments.sweep import execute, sweep
from gipip.files import read_tensors
from gipip.priors.autoencoder import load_prior

LENET, SHORT = Scenario(model="lenet"), InvertingGradients(iterations=3)


class FailsForSeed(InvertingGradients):
    """An attack that finds no way to attack with one of its seeds."""

    failing: int

    def variables(self, view):
        if self.seed == self.failing:
            raise ArithmeticError(f"no luck with seed {self.seed}")
        return super().variables(view)


class LeavesItsName(InvertingGradients):
    """An attack that says where it runs: as a line of a file for each seed."""

    folder: str

    def variables(self, view):
        with (Path(self.folder) / str(self.seed)).open("a") as file:
            print(os.environ.get("WORKER", "here"), file=file)
        return super().variables(view)


class IsKilled(LeavesItsName):
    """An attack whose process is killed the first `times`, as for want of memory."""

    times: int

    def variables(self, view):
        variables = super().variables(view)
        if (Path(self.folder) / str(self.seed)).read_text().count("here") <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return variables


class LooksAround(LeavesItsName):
    """An attack that writes down on which ports its sweep listens, and its environment."""

    def variables(self, view):
        parent = psutil.Process().parent()
        family = {parent.pid, *(child.pid for child in parent.children(recursive=True))}
        open_ones = psutil.net_connections(kind="inet")
        ports = [each.laddr for each in open_ones if each.pid in family and each.status == "LISTEN"]
        about = {"family": len(family), "ports": ports, "environment": dict(os.environ)}
        about["threads"] = torch.get_num_threads()
        (Path(self.folder) / "seen.json").write_text(json.dumps(about))
        return super().variables(view)


class MeetsAnother(LeavesItsName):
    """An attack that goes on only when another of its kind runs on another worker."""

    def variables(self, view):
        variables = super().variables(view)
        wait_until(lambda: len(names(self.folder)) == 2)
        return variables


class HangsOnce(LeavesItsName):
    """An attack that, on the first worker that comes to it, never ends."""

    def variables(self, view):
        variables = super().variables(view)
        with contextlib.suppress(FileExistsError):
            os.symlink(os.environ["WORKER"], Path(self.folder) / "hangs on")
            time.sleep(600)
        return variables


class Mine(InvertingGradients):
    """An attack that a notebook or a script defines, as SCRIPT does."""


SCRIPT = """import sys, gipip
class Mine(gipip.InvertingGradients): pass
scenarios = [gipip.Scenario(model="lenet", seed=seed) for seed in range(12)]
runs = [gipip.Run("mine", scenario, Mine(iterations=150)) for scenario in scenarios]
gipip.sweep(runs, store=sys.argv[1], workers=2)
"""


def names(folder):
    """The workers that were at work."""
    return set(" ".join(path.read_text() for path in Path(folder).glob("[0-9]*")).split())


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    return folder


@pytest.fixture
def thread():
    """An executor that computes in this process."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


class Idle(Executor):
    """An executor that says it has done what it has not."""

    def submit(self, call, *arguments):
        future = Future()
        future.set_result("")
        return future


class Refuses(Executor):
    """An executor that must not be asked."""


class Notes(ThreadPoolExecutor):
    """An executor that keeps in mind what it was asked for."""

    def submit(self, work, run):
        self.iterations = [*getattr(self, "iterations", []), run.attack.iterations]
        return super().submit(work, run)


def on_seeds(attack, count, **settings):
    return [Run("IG", LENET, attack(iterations=2, seed=seed, **settings)) for seed in range(count)]


def plain(run):
    """The images of the same attack, by the class that leaves no traces."""
    attack = InvertingGradients(iterations=run.attack.iterations, seed=run.attack.seed)
    return execute(Run("IG", run.scenario, attack)).images


def result_files(store):
    return sorted(store.folder.glob("*.safetensors"))


def modified(paths):
    return {path: path.stat().st_mtime_ns for path in paths}


# What is computed -----------------------------------------------------------------


def test_duplicates_are_computed_once_and_keep_their_arms(store, thread):
    run, other = (
        Run("one", LENET, SHORT),
        Run("another", LENET.model_copy(update={"seed": 1}), SHORT),
    )
    same = dataclasses.replace(run, arm="the same")
    results = sweep([run, other, same, run], store=store, executor=thread)
    assert [result.run.arm for result in results] == ["one", "another", "the same", "one"]
    assert len(result_files(store)) == 2 and torch.equal(results[0].images, results[2].images)


def test_a_finished_sweep_is_only_loaded(store, thread, capfd):
    runs = on_seeds(InvertingGradients, 3)
    sweep(runs, store=store, executor=thread)
    assert "attacks: 3 to compute" in capfd.readouterr().err
    before = modified(result_files(store))
    assert [
        result.run for result in sweep(runs, store=str(store.folder), executor=Refuses())
    ] == runs
    assert modified(result_files(store)) == before
    assert "to compute" not in capfd.readouterr().err


def test_a_sweep_of_nothing_gives_no_results(store):
    assert len(sweep([], store=store, executor=Refuses())) == 0


def test_the_longest_runs_begin_first(store):
    attacks = [InvertingGradients(iterations=count) for count in (1, 4, 2)]
    with Notes(1) as executor:
        sweep([Run("IG", LENET, attack) for attack in attacks], store=store, executor=executor)
    assert executor.iterations == [4, 2, 1]


def test_a_failing_run_does_not_stop_the_others_and_is_listed_with_its_error(store, thread):
    runs = on_seeds(FailsForSeed, 3, failing=1)
    text = "1 of 3 runs failed; the other results are stored in"
    with pytest.raises(SweepError, match=text) as error:
        sweep(runs, store=store, executor=thread)
    assert "- IG on dataset='cifar10'" in str(error.value)
    assert "ArithmeticError('no luck with seed 1')" in str(error.value)
    assert result_files(store) == sorted(store.path(runs[index]) for index in (0, 2))


@pytest.mark.parametrize(
    ("impossible", "error"),
    [
        ({"model": "nope"}, ModelError),
        ({"dataset": "nope"}, DataError),
        ({"model": "lenet", "epochs": 41}, ModelError),
        ({"batch_size": 11}, BatchSizeError),  # eleven images of ten different classes
        ({"batch_size": 3, "classes": (0, 1)}, BatchSizeError),
        ({"classes": (10,)}, BatchSizeError),
    ],
)
def test_an_impossible_scenario_is_refused_before_anything_is_computed(store, impossible, error):
    runs = [Run("IG", LENET, SHORT), Run("IG", Scenario(**impossible), SHORT)]
    with pytest.raises(error):
        sweep(runs, store=store, executor=Refuses())


def test_workers_that_store_elsewhere_are_noticed(store):
    with pytest.raises(StoreError, match="1 results are not in .*Workers must see this folder"):
        sweep([Run("IG", LENET, SHORT)], store=store, executor=Idle())


def test_threads_of_one_worker_do_not_disturb_each_other(store):
    scenarios = [
        Scenario(model=model, model_seed=seed) for model in ("lenet", "convnet") for seed in (1, 2)
    ]
    runs = [Run("IG", scenario, SHORT) for scenario in scenarios]
    with ThreadPoolExecutor(4) as threads:
        results = sweep(runs, store=store, executor=threads)
    assert all(torch.equal(result.images, plain(result.run)) for result in results)


# Processes of this machine --------------------------------------------------------


def test_a_sweep_here_gives_the_runs_order_and_bits_and_opens_no_port(store, folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    environment = dict(os.environ)
    attacks = [
        SHORT,
        GIPIP(prior=load_prior(), iterations=2),
        LooksAround(iterations=5, folder=str(folder)),
    ]
    runs = [Run("an arm", LENET, attack) for attack in attacks]
    results = sweep(runs, store=store, workers=2)
    assert [result.run for result in results] == runs
    assert torch.equal(results[1].images, execute(runs[1]).images)
    assert torch.equal(results[2].images, plain(runs[2]))
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["family"] > 2 and seen["ports"] == []
    inherited = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "MALLOC_MMAP_THRESHOLD_": str(2**25),
    }
    assert seen["threads"] == 1 and inherited.items() <= seen["environment"].items()
    assert dict(os.environ) == environment


def test_a_process_that_is_killed_costs_its_run_and_not_the_sweep(store, folder):
    always, once, *others = on_seeds(LeavesItsName, 5, folder=str(folder))
    always, once = (
        dataclasses.replace(run, attack=IsKilled(**dict(run.attack), times=times))
        for run, times in ((always, 99), (once, 1))
    )
    with pytest.raises(SweepError, match="1 of 5 runs failed.*\n.*SIGKILL") as error:
        sweep([always, once, *others], store=store, workers=2)
    assert str(error.value).count("\n") == 1
    assert (folder / "0").read_text().count("here") == 2, "with others, then alone"
    assert store.load(always) is None
    for run in (once, *others):
        assert torch.equal(store.load(run).images, plain(run))


def test_the_processes_of_one_executor_serve_the_next():
    with Processes(1) as executor:
        first = executor.submit(os.getpid).result()
    with Processes(1) as executor:
        assert executor.submit(os.getpid).result() == first != os.getpid()


def test_an_exception_ends_the_process_at_work_and_leaves_what_waits():
    with Processes(1) as executor:
        waiting = executor.submit(os.getpid).result()
    with pytest.raises(KeyboardInterrupt), Processes(2) as executor:
        started = time.monotonic()
        executor.submit(time.sleep, 600)
        time.sleep(0.5)  # the call is on its way to a process
        raise KeyboardInterrupt
    assert time.monotonic() - started < 60
    assert not psutil.pid_exists(waiting)
    with Processes(1) as executor:
        assert executor.submit(os.getpid).result() != waiting


def start_script(store):
    heed_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    script = store.folder.parent / "script.py"
    script.write_text(SCRIPT)  # without a guard: workers do not import it
    command = [sys.executable, str(script), str(store.folder)]
    return subprocess.Popen(command, start_new_session=True, preexec_fn=heed_ctrl_c)


def kill_process(process):
    process.kill()


def press_ctrl_c(process):
    os.killpg(process.pid, signal.SIGINT)  # a terminal or Jupyter sends it to the workers too


def test_a_killed_sweep_leaves_whole_results_and_no_process_and_goes_on_where_it_was(store, thread):
    for end, results in [(kill_process, 3), (press_ctrl_c, 7)]:
        before = modified(result_files(store))
        process = start_script(store)
        wait_until(lambda results=results: len(result_files(store)) >= results)
        family = psutil.Process(process.pid).children(recursive=True)
        end(process)
        assert process.wait(timeout=30) != 0 and len(family) >= 2
        assert not psutil.wait_procs(family, timeout=15)[1], "workers outlive their sweep"
        assert before.items() <= modified(result_files(store)).items()
        for path in result_files(store):
            read_tensors(path)
    before = modified(result_files(store))
    scenarios = [LENET.model_copy(update={"seed": seed}) for seed in range(12)]
    runs = [Run("mine", scenario, Mine(iterations=150)) for scenario in scenarios]
    assert len(sweep(runs, store=store, executor=thread)) == len(result_files(store)) == 12
    assert before.items() <= modified(result_files(store)).items()
    assert not list(store.folder.glob("*.damaged-*"))


# A dask cluster ---------------------------------------------------------------------


def switch_off(process):
    """What becomes of it when its machine loses power: worker and nanny are gone at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running(*command, **environment):
    """A dask process in a process group of its own, as if on another machine."""
    folders = (Path(__file__).parent, Path(__file__).parents[1])
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | environment
    command = [sys.executable, "-m", "dask", *command]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            switch_off(process)


def worker(address, name):
    settings = "--nthreads 1 --memory-limit 0 --preload gipip --no-dashboard --name"
    return running("worker", address, *settings.split(), name, WORKER=name)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A client of a scheduler, and the processes: the scheduler's, and two workers' by name."""
    import distributed  # here, because the workers of other tests import this module

    file = tmp_path_factory.mktemp("cluster") / "scheduler.json"
    options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file"]
    with running("scheduler", *options, str(file)) as scheduler:
        wait_until(file.exists)
        address = json.loads(file.read_text())["address"]
        with (
            worker(address, "left") as left,
            worker(address, "right") as right,
            distributed.Client(address, set_as_default=False) as client,
        ):
            client.wait_for_workers(2, timeout=120)
            yield client, {"scheduler": scheduler, "left": left, "right": right}


def test_a_sweep_runs_on_all_workers_of_a_cluster(cluster, store, folder):
    runs = on_seeds(MeetsAnother, 2, folder=str(folder))
    results = sweep(runs, store=store, executor=cluster[0].get_executor())
    assert names(folder) == {"left", "right"}
    assert all(torch.equal(result.images, plain(result.run)) for result in results)


def test_what_failed_on_a_cluster_is_tried_again_when_it_is_asked_for_again(cluster, store, folder):
    run = Run("IG", LENET, FailsForSeed(iterations=2, failing=0))
    executor = cluster[0].get_executor()
    for _ in range(2):
        with pytest.raises(SweepError, match="no luck with seed 0"):
            sweep([run], store=store, executor=executor)
    runs = on_seeds(LeavesItsName, 1, folder=str(folder))
    sweep(runs, store=store, executor=executor)
    store.path(runs[0]).unlink()
    sweep(runs, store=store, executor=executor)
    assert len((folder / "0").read_text().split()) == 2


def test_the_run_of_a_machine_that_dies_is_done_by_another(cluster, store, folder):
    client, machines = cluster
    hangs_on = folder / "hangs on"

    def kill():
        wait_until(hangs_on.is_symlink)
        switch_off(machines[os.readlink(hangs_on)])

    killer = threading.Thread(target=kill)
    killer.start()
    runs = on_seeds(HangsOnce, 1, folder=str(folder))
    (result,) = sweep(runs, store=store, executor=client.get_executor())
    killer.join()
    assert sorted((folder / "0").read_text().split()) == ["left", "right"]
    assert torch.equal(result.images, plain(runs[0]))


def test_runs_lost_with_their_scheduler_are_failures_that_say_so(cluster, store, folder):
    client, machines = cluster
    executor = client.get_executor()
    lost = threading.Timer(1, switch_off, [machines["scheduler"]])
    run = Run("IG", LENET, InvertingGradients(iterations=10**6))
    lost.start()
    with pytest.raises(SweepError, match="1 of 1 runs failed.*\n.*Cancelled"):
        sweep([run], store=store, executor=executor)


@pytest.mark.parametrize(("runs", "workers"), [([Scenario()], 1), ([], 0), ([], -1)])
def test_what_is_no_run_and_no_number_of_workers_is_refused(tmp_path, runs, workers, unchecked):
    with pytest.raises(SweepError, match=r"gipip\.Run objects and a positive number of workers"):
        sweep(runs, store=tmp_path, workers=workers)

"""Sweeps on a dask cluster started by its command line: a scheduler and workers in
processes of their own, some of which are killed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import distributed
import pytest
import torch

from gipip.attacks import InvertingGradients
from gipip.errors import SweepError
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.store import ResultStore
from gipip.experiments.sweep import execute, sweep

LENET = Scenario(model="lenet")
GPU = {"GPU": 1}


class LeavesItsName(InvertingGradients):
    """An attack that says on which worker it runs: as a line of a file for each seed."""

    folder: str

    def variables(self, view):
        with (Path(self.folder) / str(self.seed)).open("a") as file:
            print(os.environ["WORKER"], file=file)
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


def names(folder):
    """The workers that were at work."""
    return set(" ".join(path.read_text() for path in Path(folder).glob("[0-9]*")).split())


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def start(*command, **environment):
    """A dask process in a process group of its own, as if on another machine."""
    path = os.pathsep.join(
        [
            str(Path(__file__).parent),
            str(Path(__file__).parents[1]),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    environment = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "dask", *command], env=environment, start_new_session=True
    )


def switch_off(process):
    """What becomes of it when its machine loses power: worker and nanny are gone at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running(*command, **environment):
    process = start(*command, **environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            switch_off(process)


@contextlib.contextmanager
def running_scheduler(folder):
    """The process and the address of a scheduler."""
    file = folder / "scheduler.json"
    options = [
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--dashboard-address",
        "127.0.0.1:0",
        "--scheduler-file",
        str(file),
    ]
    with running("scheduler", *options) as process:
        wait_until(file.exists)
        yield process, json.loads(file.read_text())["address"]


def worker(address, name, *options):
    settings = [
        "--nthreads",
        "1",
        "--memory-limit",
        "0",
        "--preload",
        "gipip",
        "--no-dashboard",
        "--name",
        name,
    ]
    return running("worker", address, *settings, *options, WORKER=name)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a scheduler with a worker that has a GPU (so it says) and one that
    has none.
    """
    with (
        running_scheduler(tmp_path_factory.mktemp("cluster")) as (_, address),
        worker(address, "gpu", "--resources", "GPU=1"),
        worker(address, "plain"),
        distributed.Client(address, set_as_default=False) as client,
    ):
        client.wait_for_workers(2, timeout=120)
        yield address


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "store")


def runs(attack, folder, count=2):
    folder.mkdir()
    return [
        Run("IG", LENET, attack(iterations=2, seed=seed, folder=str(folder)))
        for seed in range(count)
    ]


@contextlib.contextmanager
def switched_off_where_it_hangs(folder, machines):
    """The machine on which an attack hangs loses its power."""
    hangs_on = folder / "hangs on"
    killer = threading.Thread(
        target=lambda: (
            wait_until(hangs_on.is_symlink),
            switch_off(machines[os.readlink(hangs_on)]),
        )
    )
    killer.start()
    yield
    killer.join()


def result_files(store):
    return sorted(store.folder.glob("*.safetensors"))


def test_a_sweep_runs_on_all_workers_of_a_cluster_by_its_address_alone(cluster, store, tmp_path):
    results = sweep(runs(MeetsAnother, tmp_path / "names"), store=store, scheduler=cluster)
    assert names(tmp_path / "names") == {"gpu", "plain"}
    for seed, result in enumerate(results):
        assert torch.equal(
            result.images,
            execute(Run("IG", LENET, InvertingGradients(iterations=2, seed=seed))).images,
        )


def test_the_address_may_stand_in_dasks_configuration(cluster, store, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "LocalCluster", None)
    with dask.config.set({"scheduler-address": cluster}):  # where dask puts DASK_SCHEDULER_ADDRESS
        assert len(sweep(runs(LeavesItsName, tmp_path / "names"), store=store, workers=2)) == 2
    assert names(tmp_path / "names") <= {"gpu", "plain"}


def test_runs_that_need_a_gpu_go_only_to_workers_that_offer_one(cluster, store, tmp_path):
    sweep(
        runs(LeavesItsName, tmp_path / "names", count=8),
        store=store,
        scheduler=cluster,
        resources=GPU,
    )
    assert names(tmp_path / "names") == {"gpu"}


def test_the_run_of_a_machine_that_dies_is_done_by_another_as_long_as_there_is_one(
    cluster, store, tmp_path, monkeypatch
):
    with (
        worker(cluster, "left", "--resources", "spare=1") as left,
        worker(cluster, "right", "--resources", "spare=1") as right,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(4, timeout=120)
        machines = {"left": left, "right": right}
        first, second = tmp_path / "first", tmp_path / "second"
        with switched_off_where_it_hangs(first, machines):
            (result,) = sweep(
                runs(HangsOnce, first, count=1),
                store=store,
                scheduler=cluster,
                resources={"spare": 1},
            )
        assert (first / "0").read_text().split() in (["left", "right"], ["right", "left"])
        assert torch.equal(
            result.images, execute(Run("IG", LENET, InvertingGradients(iterations=2))).images
        )
        monkeypatch.setattr("gipip.cluster.PATIENCE", 0.5)
        with (
            switched_off_where_it_hangs(second, machines),
            pytest.raises(
                SweepError,
                match=r"No worker that offers spare=1 is connected .*\(2 workers are\).*runs not done: 1\.",
            ),
        ):
            sweep(
                runs(HangsOnce, second, count=1),
                store=store,
                scheduler=cluster,
                resources={"spare": 1},
            )
    assert result_files(store) == [store.path(result.run)]


def test_a_resource_that_no_worker_offers_is_an_error_that_says_how_to_start_one(
    cluster, store, tmp_path, monkeypatch
):
    monkeypatch.setattr("gipip.cluster.PATIENCE", 0.5)
    needed = {"GPU": 2, "memory": 1.5}
    message = r'No worker that offers GPU=2 memory=1.5 .*\(2 workers are\).*--resources "GPU=2 memory=1.5"`.*not done: 2'
    with (
        pytest.warns(UserWarning, match="Waiting for one"),
        pytest.raises(SweepError, match=message),
    ):
        sweep(
            runs(LeavesItsName, tmp_path / "names"),
            store=store,
            scheduler=cluster,
            resources=needed,
        )
    assert not names(tmp_path / "names")


def test_runs_lost_with_their_scheduler_are_failures_that_say_so(store, tmp_path, monkeypatch):
    with running_scheduler(tmp_path) as (process, address):
        as_completed = distributed.as_completed
        monkeypatch.setattr(
            distributed,
            "as_completed",
            lambda futures: (switch_off(process), as_completed(futures))[1],
        )
        with (
            pytest.warns(UserWarning, match="No worker is connected"),
            pytest.raises(
                SweepError, match="it was cancelled: the scheduler cannot be reached any more"
            ),
        ):
            sweep(runs(LeavesItsName, tmp_path / "names"), store=store, scheduler=address)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "head"])
def test_an_address_without_a_scheduler_is_an_error_that_says_how_to_start_one(
    store, tmp_path, address
):
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(SweepError, match=f"no dask scheduler at '{address}'.*`dask scheduler`"),
    ):
        sweep(runs(LeavesItsName, tmp_path / "names"), store=store, scheduler=address)


def test_resources_without_a_cluster_are_refused(store, tmp_path):
    with pytest.raises(
        SweepError, match="Workers on this machine offer no .*{'GPU': 1.0}.*address"
    ):
        sweep(runs(LeavesItsName, tmp_path / "names"), store=store, resources=GPU)

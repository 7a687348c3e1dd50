"""Attacks that are out of time, and go on another time as if nothing had happened."""

import time

import pytest
import torch

import gipip
from gipip.attacks import checkpoints
from gipip.attacks.checkpoints import Checkpoint
from gipip.errors import OutOfTime
from gipip.files import read_tensors
from gipip.priors.gan import GenerativePrior, Generator


class Clock:
    """Moves on by a second with every step of an attack that it watches."""

    now = 0
    perf_counter = staticmethod(time.perf_counter)

    def time(self):
        return self.now

    def watch(self, *call):
        self.now += 1


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(checkpoints, "time", clock)
    return clock


@pytest.fixture(scope="module")
def lenet():
    return gipip.build_model("lenet")


@pytest.fixture(scope="module")
def update(lenet):
    return gipip.Client(lenet).share(gipip.load_dataset("cifar10").tuning())


def _attack(name):
    torch.manual_seed(0)
    generator = GenerativePrior(Generator(width=4, latent_size=8))
    prior = gipip.load_prior()
    return {
        "GIPIP": lambda: gipip.GIPIP(prior=prior, iterations=30),
        "GIPIP in steps": lambda: gipip.GIPIP(
            prior=prior, iterations=30, schedule="steps", signed=False
        ),
        "IG": lambda: gipip.InvertingGradients(iterations=9, restarts=3, returns="lowest_cost"),
        "GIAS": lambda: gipip.GIAS(
            prior=generator, iterations=9, latent_iterations=7, latent_restarts=2, restarts=2
        ),
    }[name]()


def in_pieces(attack, model, update, path, clock, steps):
    """The result of an attack that pauses after so many steps again and again, and the pieces."""
    for pieces in range(1, 100):
        kept = Checkpoint(path, deadline=clock.now + steps, run="this one")
        try:
            return attack(model, update, checkpoint=kept, **watched(clock)), pieces
        except OutOfTime:
            continue
    raise AssertionError("the attack never came to its end")


def watched(clock):
    return {"watch": clock.watch, "watch_every": 1}


def assert_same_bits(found, expected):
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)
    assert set(found.history) == set(expected.history)
    assert all(
        torch.equal(values, expected.history[name]) for name, values in found.history.items()
    )
    assert found.restart_costs == expected.restart_costs
    assert (found.cost, found.notes) == (expected.cost, expected.notes)


@pytest.mark.parametrize("name", ["GIPIP", "GIPIP in steps", "IG", "GIAS"])
def test_an_attack_in_pieces_gives_the_bits_of_an_uninterrupted_one_and_repeats_no_step(
    name, lenet, update, clock, tmp_path
):
    attack = _attack(name)
    whole = attack(lenet, update, **watched(clock))
    steps = clock.now
    found, pieces = in_pieces(attack, lenet, update, tmp_path / "key", clock, steps=10)
    assert clock.now == 2 * steps and pieces > 2
    assert_same_bits(found, whole)


def test_an_attack_in_train_mode_goes_on_with_the_same_bits(clock, tmp_path):
    model = gipip.build_model("convnet16")
    attack = gipip.GradInversion(iterations=9, schedule="steps")
    batch = gipip.load_dataset("cifar10").tuning(batch_size=2)
    update = gipip.Client(model).share(batch, mode="train", statistics="shared")
    found, pieces = in_pieces(attack, model, update, tmp_path / "key", clock, steps=5)
    assert pieces == 2
    assert_same_bits(found, attack(model, update))


def test_an_attempt_whose_cost_is_not_finite_ends_at_the_same_iteration_in_pieces(
    lenet, update, clock, tmp_path
):
    attack = gipip.InvertingGradients(iterations=50, tv_weight=3e38, restarts=2)
    with pytest.warns(UserWarning, match="not finite"):
        whole = attack(lenet, update)
    with pytest.warns(UserWarning, match="not finite"):
        found, _ = in_pieces(attack, lenet, update, tmp_path / "key", clock, steps=1)
    assert found.notes == whole.notes and torch.equal(found.images, whole.images)
    lengths = [len(terms) for result in (found, whole) for terms in result.history.values()]
    assert lengths == [2] * 4


def test_the_seconds_of_all_pieces_count(lenet, update, clock, tmp_path):
    attack = gipip.InvertingGradients(iterations=8)
    with pytest.raises(OutOfTime, match="paused after 4 of 8 iterations"):
        attack(lenet, update, checkpoint=Checkpoint(tmp_path / "key", 4), **watched(clock))
    before = read_tensors(tmp_path / "key-1.safetensors")[1]["seconds"]
    kept = Checkpoint(tmp_path / "key")
    assert attack(lenet, update, checkpoint=kept).seconds > before > 0
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_dlg_cannot_pause_and_runs_to_its_end(lenet, update, tmp_path):
    kept = Checkpoint(tmp_path / "key", deadline=0)
    found = gipip.DLG(iterations=2)(lenet, update, checkpoint=kept)
    assert len(found.history["gradient matching"]) == 3 and not list(tmp_path.iterdir())


def test_a_state_is_kept_every_few_minutes_so_a_killed_machine_loses_little(
    lenet, update, clock, tmp_path
):
    attack, kept = gipip.InvertingGradients(iterations=25), Checkpoint(tmp_path / "key")

    def dies(iteration, *call):
        clock.now += 60
        if iteration == 15:
            raise MemoryError

    with pytest.raises(MemoryError):
        attack(lenet, update, checkpoint=kept, watch=dies, watch_every=1)
    seen = []
    again = {"watch": lambda *call: seen.append(call), "watch_every": 1}
    found = attack(lenet, update, checkpoint=Checkpoint(tmp_path / "key"), **again)
    assert 10 <= len(seen) < 15 + 3, "at most three minutes are lost"
    assert_same_bits(found, attack(lenet, update))


def cut(path, lenet, update):
    path.write_bytes(path.read_bytes()[:-100])


def of_another_run(path, lenet, update):
    other = Checkpoint(path.with_name("other"), run="another one")
    gipip.InvertingGradients(iterations=2)(lenet, update, checkpoint=other)
    path.write_bytes(other.file.read_bytes())


@pytest.mark.parametrize("damage", [cut, of_another_run])
def test_a_checkpoint_that_is_damaged_or_of_another_run_is_reported_and_set_aside(
    damage, lenet, update, clock, tmp_path
):
    attack, path = gipip.InvertingGradients(iterations=12), tmp_path / "key-1.safetensors"
    with pytest.raises(OutOfTime, match="paused after 5 of 12"):
        kept = Checkpoint(tmp_path / "key", deadline=5, run="this one")
        attack(lenet, update, checkpoint=kept, **watched(clock))
    damage(path, lenet, update)
    damaged = path.read_bytes()
    with pytest.warns(UserWarning, match="set aside as key-1.damaged-.* computed again"):
        kept = Checkpoint(tmp_path / "key", run="this one")
        found = attack(lenet, update, checkpoint=kept)
    assert [path.read_bytes() for path in tmp_path.glob("*.damaged-*")] == [damaged]
    assert_same_bits(found, attack(lenet, update))

"""Progress: plain lines when nobody watches, a bar when somebody does."""

import sys
import threading

import pytest

from gipip.progress import headless, progress, quiet


@pytest.mark.parametrize(("setting", "expected"), [("1", True), ("yes", True), ("0", False)])
def test_the_environment_decides_whether_progress_is_headless(monkeypatch, setting, expected):
    monkeypatch.setenv("GIPIP_HEADLESS", setting)
    assert headless() is expected


@pytest.mark.parametrize("terminal", [True, False])
def test_without_the_environment_a_terminal_decides(monkeypatch, terminal):
    monkeypatch.delenv("GIPIP_HEADLESS", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert headless() is not terminal


def test_a_live_notebook_is_not_headless(monkeypatch):
    class Shell:
        config = {"IPKernelApp": {}}

    class IPython:
        get_ipython = Shell

    monkeypatch.delenv("GIPIP_HEADLESS", raising=False)
    monkeypatch.setitem(sys.modules, "IPython", IPython)
    assert not headless()


@pytest.fixture
def no_terminal(monkeypatch):
    monkeypatch.setenv("GIPIP_HEADLESS", "1")


def test_headless_progress_gives_the_items_and_one_plain_line(no_terminal, capsys):
    assert list(progress(range(5), description="attack", unit="step")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.startswith("attack: 5/5 step, 00:00 passed")


def test_headless_progress_never_moves_the_cursor_and_ends_every_line(no_terminal, capsys):
    with progress(total=50) as bar:
        bar.mininterval = 0
        for _ in range(50):
            bar.update()
    written = capsys.readouterr().err
    assert "\r" not in written and "\x1b" not in written and written.endswith("\n")
    assert len(written.splitlines()) > 40 and "50/50 it" in written.splitlines()[-1]


def test_headless_progress_of_a_fast_loop_is_one_line(no_terminal, capsys):
    with progress(total=1_000) as bar:
        for _ in range(1_000):
            bar.update()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_headless_progress_of_a_loop_that_ends_before_its_delay_is_no_line(no_terminal, capsys):
    assert list(progress(range(3), delay=5)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_headless_progress_within_another_one_never_moves_the_cursor(no_terminal, capsys):
    with progress(total=1, description="outer"), progress(total=2, description="inner") as inner:
        inner.mininterval = 0
        inner.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["inner", "inner", "outer"]


def test_headless_progress_prints_when_its_interval_has_passed(no_terminal, capsys):
    with progress(total=3) as bar:
        bar.update()
        bar.last_print_t -= 11
        bar.update()
        assert capsys.readouterr().err.startswith("2/3 it")


def test_headless_progress_knows_no_total_of_a_generator(no_terminal, capsys):
    assert list(progress(iter("ab"))) == ["a", "b"]
    assert "2/?" in capsys.readouterr().err


def test_interactive_progress_is_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("GIPIP_HEADLESS", "0")
    assert list(progress(range(3), description="attack")) == [0, 1, 2]
    assert "100%" in capsys.readouterr().err


def test_inside_quiet_nothing_is_shown_and_everything_still_works(no_terminal, capsys):
    with quiet():
        assert list(progress(range(3), description="attack")) == [0, 1, 2]
        with progress(total=2) as bar:
            bar.set_postfix(cost=1)
            bar.update()
    assert capsys.readouterr().err == ""
    list(progress(range(3)))
    assert "3/3" in capsys.readouterr().err


def test_quiet_holds_for_its_own_thread_only(no_terminal, capsys):
    with quiet():
        thread = threading.Thread(target=lambda: list(progress(range(3))))
        thread.start()
        thread.join()
    assert "3/3" in capsys.readouterr().err

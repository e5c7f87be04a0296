"""A signal is noted while there is something to save, and ends the process while there is not."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from recsys_lightning.signals import StopSignals


@pytest.fixture
def signals():
    found = StopSignals()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    found.listen()
    yield found
    found.restore()
    assert before == {number: signal.getsignal(number) for number in before}, "the handlers of before are back"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_before_the_training_it_ends_the_process(signals, number):
    with pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), number)
    assert stop.value.code == 128 + number


def test_before_the_training_ctrl_c_is_ctrl_c(signals):
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_in_the_training_the_first_is_noted_and_said(signals, capfd):
    signals.begin()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert signals.received == signal.SIGUSR1
    assert capfd.readouterr().err == "SIGUSR1: saving after this step\n"


def test_a_second_ctrl_c_does_not_wait(signals):
    signals.begin()
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_new_training_in_the_same_process_has_not_been_signalled(signals):
    signals.begin()
    os.kill(os.getpid(), signal.SIGTERM)
    signals.restore()
    signals.listen()
    assert signals.received is None


def test_in_another_thread_nothing_is_changed():
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=StopSignals().listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_fit_listens_before_it_imports_anything_heavy():
    code = (
        "import sys, signal; from recsys_lightning.cli import main; import recsys_lightning.cli as cli\n"
        "def stop(name): print(signal.getsignal(signal.SIGUSR1), 'torch' in sys.modules); raise SystemExit(0)\n"
        "cli.importlib.import_module = stop; main(['fit'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "StopSignals._came" in out
    assert out.strip().endswith("False")

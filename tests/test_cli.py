import contextlib
import os
import signal
import subprocess
import sys

import pytest

from valdi_jax import cli

HANGING = """
import os, signal, sys, time
from valdi_jax import cli
with cli.interruptible():
    for signum in sys.argv[1:]:
        os.kill(os.getpid(), int(signum))
        time.sleep(0.8)
    time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_waits_for_a_good_moment(signum):
    with cli.interruptible() as check:
        check()
        os.kill(os.getpid(), signum)
        with pytest.raises(cli.Interrupted, match=signum.name):
            check()


def test_a_second_signal_ends_a_process_whose_reader_has_stalled():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, b"x" * 4096):
            pass
    os.set_blocking(writing, True)
    signals = [str(int(signal.SIGTERM))] * 3
    program = subprocess.Popen([sys.executable, "-c", HANGING, *signals], stderr=writing)
    assert program.wait(timeout=30) == 130
    os.close(reading)
    os.close(writing)


def test_a_second_signal_ends_the_process_at_once():
    signals = [str(int(s)) for s in (signal.SIGTERM, signal.SIGINT)]
    done = subprocess.run(
        [sys.executable, "-c", HANGING, *signals], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 130
    assert done.stderr.count("stopping after the step under way") == 1

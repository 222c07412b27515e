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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_a_good_moment(signum):
    with cli.interruptible() as check:
        check()
        os.kill(os.getpid(), signum)
        with pytest.raises(cli.Interrupted, match=signum.name):
            check()


def test_a_second_signal_ends_the_process_at_once():
    signals = [str(int(s)) for s in (signal.SIGTERM, signal.SIGINT)]
    done = subprocess.run(
        [sys.executable, "-c", HANGING, *signals], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 130
    assert done.stderr.count("stopping after the step under way") == 1

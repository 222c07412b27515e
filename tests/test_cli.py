import os
import signal

import pytest

from valdi_jax import cli


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_a_good_moment_and_a_second_does_not(signum):
    with cli.interruptible() as check:
        check()
        os.kill(os.getpid(), signum)
        with pytest.raises(cli.Interrupted, match=signum.name):
            check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

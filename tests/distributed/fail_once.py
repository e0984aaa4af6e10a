"""svg_t2i.train, whose rank 1 is killed before step 4 of torchrun's first attempt; for test_dit_parallel."""

import os
import signal
import sys

from svg_t2i import train

step = train.train_step


def fatal_step(state, *arguments):
    if state.step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    step(state, *arguments)


train.train_step = fatal_step
train.main(sys.argv[1:])

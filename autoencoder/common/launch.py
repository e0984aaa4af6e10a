"""torchrun with an exit code that says what its processes ended with.

    python -m autoencoder.common.launch --standalone --nproc_per_node 8 -m svg_t2i.train --config stage1_256.yaml

Arguments and environment (PET_*) are torchrun's. torchrun itself ends with 1 for every end of its processes, so that
whoever started it cannot tell "start the same command again" (75) from "a person has to change something" (2). Here the
code is that of the process that ended first, 128 + n where signal n ended it. Asked to end by a signal, it is 75, or
130 after Ctrl-C, as that of the processes.
"""

from __future__ import annotations

import signal
import sys

from autoencoder.common.stopping import EXIT_CODE, INTERRUPTED

KNOWN = (EXIT_CODE, INTERRUPTED, 2)  # of which the process has said all that there is to say


def main(argv: list[str] | None = None) -> int:
    """Run torchrun; returns the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(sys.argv[1:] if argv is None else argv))
    except ChildFailedError as error:
        code = exit_code(error.get_first_failure()[1].exitcode)
        if code not in KNOWN:
            print(error, file=sys.stderr, flush=True)
        return code
    except SignalException as error:
        return INTERRUPTED if error.sigval == signal.SIGINT else EXIT_CODE
    return 0


def exit_code(code: int) -> int:
    """A process's exit code as shells have it: 128 + n where signal n ended it."""
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())

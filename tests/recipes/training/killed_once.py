"""The command line, the second process of which is killed in a step; not when it is started again."""

import os
import signal
import sys

from adderkit.cli import main
from adderkit.recipes.training import epoch as steps

if __name__ == "__main__":
    step, done = int(sys.argv[1]), []
    original = steps._step

    def counting(*arguments):
        done.append(None)
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(done) == step:
            print("killed itself", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    steps._step = counting
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    main()

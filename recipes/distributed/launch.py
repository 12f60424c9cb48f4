"""Run of a command line in several processes of this machine, and their end: together, with one line of error.

``accelerate launch`` and ``torchrun`` work as well, and several machines need one of them. This launcher does less: it
starts at once, since it does not import torch; a failure is one line, not a table and tracebacks; and no process
outlives the launcher, or a process that failed, for long.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from ..configs.files import parse_yaml, read_text
from .worker import LAUNCHER, LOST

_OPTION = "--num-processes"
_PATIENCE = 10.0  # seconds that the others have to end by themselves after one has failed
_PATIENCE_OF_A_STOP = 60.0  # the same where all were asked to stop, and a tracker may have something to send
_SECONDS_BETWEEN_LOOKS = 0.05


def launch(words: Sequence[str], processes: int) -> int:
    """Run ``python -m adderkit WORDS`` in several processes of this machine, one per GPU, or on the CPU without GPUs.

    Args:
        words: The command line; ``--num-processes`` is removed from it.
        processes: Number of processes.

    Returns:
        The exit status: 0, or 1 after a failure, whose reason is printed.
    """
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    group = ProcessGroup([sys.executable, "-m", "adderkit", *without_option(words)], processes, writing)
    group.handle_signals()
    group.start()
    os.close(writing)
    group.wait()
    line = group.failure(_messages(reading))
    if line is None:
        return 0
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 1


def processes_of_run(folder: str) -> int:
    """Return the number of processes of a run, which a resumed run has too; 1 where there is no run.

    Raises:
        RecipeError: Its ``args.yaml`` is not valid YAML.
    """
    path = Path(folder) / "args.yaml"
    processes = parse_yaml(read_text(path), str(path)).get("processes") if path.is_file() else None
    return processes if type(processes) is int and processes > 0 else 1


class ProcessGroup:
    """Processes that run the same command and end together.

    Args:
        command: The command.
        processes: Number of processes.
        channel: End of a pipe to which the processes write messages.
    """

    def __init__(self, command: Sequence[str], processes: int, channel: int) -> None:
        self.command = list(command)
        self.processes = processes
        self.channel = channel
        self.children: list[subprocess.Popen[bytes]] = []
        self.ended: list[int] = []  # ranks, in the order in which they ended
        self.signals = 0

    def start(self) -> None:
        """Start the processes, each in a session of its own: signals of the terminal reach them through this one."""
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(self.processes),
            "LOCAL_WORLD_SIZE": str(self.processes),
            LAUNCHER: f"{os.getpid()}:{self.channel}",
        }
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        for rank in range(self.processes):
            own = {"OMP_NUM_THREADS": str(threads), **os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.children.append(
                subprocess.Popen(self.command, env=own, pass_fds=[self.channel], start_new_session=True)
            )
        if self.signals:  # one came while they were being started
            self._send(signal.SIGTERM)

    def wait(self) -> None:
        """Wait until all processes have ended; after a failure, kill those that do not end by themselves in time."""
        deadline = None
        while len(self.ended) < self.processes:
            for rank, child in enumerate(self.children):
                if rank not in self.ended and child.poll() is not None:
                    self.ended.append(rank)
                    if child.returncode and deadline is None:
                        stopped = self.signals and child.returncode > 0
                        deadline = time.monotonic() + (_PATIENCE_OF_A_STOP if stopped else _PATIENCE)
            if deadline is not None and time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def failure(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return the line that says why the processes failed; ``None`` if they did not.

        The first process to end badly is the cause, unless it only says that it has lost another. Where the processes
        were asked to end, the line is what the main one says.
        """
        failed = {rank: self.children[rank].returncode for rank in self.ended if self.children[rank].returncode}
        if not failed:
            return None
        errors = {int(each["rank"]): each["error"] for each in messages if "error" in each}
        resume = "".join(f"; continue with: {each['resume']}" for each in messages if "resume" in each)
        resume = resume or "; run the same command again"
        if self.signals:
            return errors.get(0, f"interrupted{resume}")
        spoken = {rank for rank, error in errors.items() if not error.startswith(LOST)}
        first = next((rank for rank, status in failed.items() if status < 0 or rank in spoken), next(iter(failed)))
        if first in errors:
            same = first == 0 or errors.get(0) == errors[first]
            return errors[first] if same else f"process {first}: {errors[first]}"
        if failed[first] < 0:
            return f"process {first} was killed by {signal.Signals(-failed[first]).name}{resume}"
        return f"process {first} ended with status {failed[first]}{resume}"

    def handle_signals(self) -> None:
        """Pass the first Ctrl-C or SIGTERM on as SIGTERM, and kill at the second; until this process ends."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        self._send(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)


def _messages(channel: int) -> list[dict[str, str]]:
    """Read what the processes wrote; the pipe may still be open in a loader process that is about to end."""
    written = b""
    while select.select([channel], [], [], 0)[0]:
        piece = os.read(channel, 1 << 16)
        if not piece:
            break
        written += piece
    return [json.loads(line) for line in written.splitlines()]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def without_option(words: Sequence[str]) -> list[str]:
    """Return a command line without ``--num-processes N`` or ``--num-processes=N``."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith(_OPTION):
            kept.append(word)
        skip = word == _OPTION
    return kept

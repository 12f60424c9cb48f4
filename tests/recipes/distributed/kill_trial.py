"""Trial: a run of two processes, killed at random instants and begun again each time, ends as one that nothing stopped.

``python tests/recipes/distributed/kill_trial.py DIR --kills 20 --seed 1`` prints one line per kill, and the result.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

SETTINGS = {
    "train_images": 128,
    "batch_size": 16,
    "epochs": 6,
    "save_every": 1,
    "log_interval": 1,
    "workers": 0,
    "crop_padding": 1,
    "hflip": 0.5,
}
KINDS = ("rank", "launcher", "SIGTERM", "SIGINT", "SIGINT twice", "SIGTERM to a rank")
SECONDS_TO_END = 30.0


def command(folder):
    """Start the run, or resume it once it has begun, as its messages say."""
    words = [sys.executable, "-m", "adderkit", "finetune"]
    if (folder / "args.yaml").exists():
        return [*words, "--resume", str(folder)]
    words += ["cifar_resnet20", "--no-pretrained", "--dataset", "digits", "--output", str(folder)]
    words += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    return [*words, "--num-processes", "2"]


def begin(folder):
    return subprocess.Popen(
        command(folder), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def ranks(launcher):
    return psutil.Process(launcher.pid).children()


def wait_for_a_place(process, folder, generator):
    """Wait for a random time from the start, or for a random number of lines in the log and a little more."""
    if generator.random() < 0.3:
        delay, lines = generator.uniform(1.5, 20), 0  # not within the first imports of Python
    else:
        delay, lines = generator.uniform(0, 1.5), generator.randrange(1, 8)
    log = folder / "log.txt"
    before = log.read_text().count("\n") if log.exists() else 0
    end = time.monotonic() + 180
    while lines and process.poll() is None and time.monotonic() < end:
        if log.exists() and log.read_text().count("\n") >= before + lines:
            break
        time.sleep(0.02)
    time.sleep(delay)


def kill(process, kind, generator):
    """Send what the kind says; return what was done, and the processes that are to end."""
    children = ranks(process)
    if kind in ("rank", "SIGTERM to a rank") and not children:
        kind = "launcher"  # which has not started them yet
    if kind == "rank":
        generator.choice(children).kill()
    elif kind == "SIGTERM to a rank":
        generator.choice(children).terminate()
    elif kind == "launcher":
        process.kill()
    else:
        process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT)
        if kind == "SIGINT twice":
            time.sleep(generator.uniform(0, 1))
            process.send_signal(signal.SIGINT)
    return kind, children


def trial(folder, kills, seed, say=print):
    """Kill and begin again; return what was wrong, a line each."""
    generator, wrong = random.Random(seed), []
    for number in range(kills):
        kind = KINDS[generator.randrange(len(KINDS))]
        process = begin(folder)
        wait_for_a_place(process, folder, generator)
        if process.poll() is not None:
            errors = process.communicate()[1]
            say(f"{number} {kind}: ended before, status {process.returncode}")
            if process.returncode:
                wrong.append(f"{number} {kind}: not killed, yet ended with {errors[-600:]}")
            else:
                break
            continue
        kind, children = kill(process, kind, generator)
        started = time.monotonic()
        try:
            errors = process.communicate(timeout=90)[1]
        except subprocess.TimeoutExpired:
            wrong.append(f"{number} {kind}: the command did not end")
            process.kill()
            errors = process.communicate()[1]
        seconds = time.monotonic() - started
        if kind != "launcher":  # its processes end while the next command waits for them
            alive = psutil.wait_procs(children, timeout=0.5)[1]
            wrong += [f"{number} {kind}: {each.pid} is alive" for each in alive]
        lines = [line for line in errors.splitlines() if re.match("error:|Aborted", line)]
        say(f"{number} {kind}: {seconds:.1f} s, status {process.returncode}, {lines}")
        # Nothing is told where the launcher was killed, the run was as good as done, or Ctrl-C met its imports.
        told = len(lines) == 1 or kind == "launcher" or process.returncode in (0, 130, -2)
        if seconds > SECONDS_TO_END or "Traceback" in errors or not told:
            wrong.append(f"{number} {kind}: {seconds:.1f} s, {errors[-1500:]}")
    process = begin(folder)
    errors = process.communicate(timeout=400)[1]
    if process.returncode:
        wrong.append(f"the last command ended with {errors[-1500:]}")
    return wrong


def differences(folder, straight):
    """Name what differs between two runs."""
    names = ["summary.csv", "layers.csv", "last/model.safetensors", "best/model.safetensors"]
    names += ["last/state/process_statistics.safetensors"]
    return [name for name in names if (folder / name).read_bytes() != (straight / name).read_bytes()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    straight, folder = arguments.place / "straight", arguments.place / f"killed-{arguments.seed}"
    if not (straight / "plots").exists():
        begin(straight).communicate()
    wrong = trial(folder, arguments.kills, arguments.seed, lambda line: print(line, flush=True))
    wrong += [f"{name} differs" for name in differences(folder, straight)]
    print("\n".join(wrong) or "equal, bit for bit")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""Files of the main process reach processes that do not see them; what differs between processes is refused."""

from pathlib import Path

SCRIPT = Path(__file__).with_name("exchanging.py")


def test_two_processes_without_a_shared_folder(run_processes, tmp_path):
    run_processes(SCRIPT, 2, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [
        "0/done", "0/run/last/model.bin", "0/run/last/state/run.json", "1/done",
    ]  # fmt: skip

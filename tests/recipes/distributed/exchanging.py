"""What ``test_exchange.py`` runs in two processes, of which the second does not see the files of the first."""

import os
from pathlib import Path

import pytest

from adderkit.convert.errors import RecipeError
from adderkit.recipes.distributed.connect import connect
from adderkit.recipes.distributed.exchange import from_main, is_shared, local_copy, require_same, require_shared

FILES = {"model.bin": bytes(range(256)) * 9, "state/run.json": b"{}"}


def main(environment, place):
    """The first makes a folder in its working directory; the second has another working directory."""
    os.environ.update(environment)
    rank = connect().process_index
    own = Path(place) / str(rank)
    own.mkdir()
    os.chdir(own)
    folder = Path("run") / "last"
    for name, content in FILES.items() if rank == 0 else ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert from_main(rank) == 0
    assert is_shared(Path(place))
    assert not is_shared(folder.parent)
    with local_copy(folder) as copy:
        assert (copy == folder) == (rank == 0)
        assert {str(each.relative_to(copy)): each.read_bytes() for each in copy.rglob("*.*")} == FILES
    with local_copy(folder.parent / "nothing") as copy:
        assert not copy.exists()
    assert (own / "run").exists() == (rank == 0)
    require_same("images", [20])
    with pytest.raises(RecipeError, match=r"process 1 has \[21\] images, expected \[20\], as on process 0"):
        require_same("images", [20 + rank])
    with pytest.raises(RecipeError, match="is on one machine only, expected a file system that all machines share"):
        require_shared(folder.parent)
    (own / "done").touch()


if __name__ == "process":
    main(*globals()["arguments"])

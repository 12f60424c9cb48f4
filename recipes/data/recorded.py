"""The data set that a saved model was made with: recorded in its report, and the default of later verbs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...convert.errors import DatasetError
from ...convert.model_source import ModelSource

_FETCHING = ("hfds/", "hfids/", "tfds/", "wds/")  # readers that may download


def data_facts(dataset: str, data_dir: str | None) -> dict[str, Any]:
    """Return what a report records of a data set: its name, and the absolute path of its folder on this machine."""
    if data_dir is None:
        return {"dataset": dataset}
    return {"dataset": dataset, "data_dir": str(Path(data_dir).resolve()) if Path(data_dir).exists() else data_dir}


def default_data(
    source: ModelSource,
    dataset: str | None,
    data_dir: str | None,
    announce: Callable[[str], None],
    *,
    needed: bool = True,
) -> tuple[str | None, str | None]:
    """Return the data set that was given, or else the one that a saved model records.

    A report may be somebody else's, so that nothing is downloaded because it says so.

    Args:
        source: The model as it was named.
        dataset: Value of ``--dataset``.
        data_dir: Value of ``--data-dir``; without a data set, the place where the recorded one is now.
        announce: Called with a line that says what is used.
        needed: Whether the verb needs images; otherwise it goes on without them, and a line says why.

    Returns:
        Name and folder of the data set; ``None`` where neither is known.

    Raises:
        DatasetError: The recorded data set is not where it was, or would be downloaded.
    """
    name, place = (source.report().data.get(key) for key in ("dataset", "data_dir"))
    if dataset is not None or not isinstance(name, str) or not name:
        return dataset, data_dir
    place = data_dir or (place if isinstance(place, str) else None)
    if place is not None and not Path(place).exists():
        problem = (
            f"{source.name} was made with data set {name} in {place}, which does not exist; say where it is now with "
            "--data-dir DIR, or name another with --dataset"
        )
    elif name.startswith(_FETCHING) and place is None:
        problem = (
            f"{source.name} was made with data set {name}, which may be downloaded: allow that with --dataset {name}"
        )
    else:
        where = f" in {place}" if place else ""
        announce(f"using data set {name}{where}, with which {source.name} was made; --dataset names another")
        return name, place
    if needed or data_dir is not None:
        raise DatasetError(problem)
    announce(f"no images: {problem}")
    return None, None

"""Objects other than tensors that checkpoints hold, by name: none of them is created, a placeholder is read instead.

Training scripts save their arguments, metrics and paths next to the weights. Nothing here needs their values.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

_NUMPY = ("core.multiarray", "_core.multiarray")
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
_LIGHTNING = (
    "pytorch_lightning.utilities.parsing",
    "lightning_fabric.utilities.data",
    "lightning.fabric.utilities.data",
)

_VALUES = (
    "argparse.Namespace",  # the arguments of timm's train.py
    "types.SimpleNamespace",
    *(f"pathlib.{name}" for name in _PATHS),
    *(f"pathlib._local.{name}" for name in _PATHS),  # Python 3.13
    *(f"numpy.{module}.{name}" for module in _NUMPY for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    "datetime.datetime",
    "datetime.date",
    "datetime.timedelta",
    "datetime.timezone",
    "torch.torch_version.TorchVersion",
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"builtins.{name}" for name in ("int", "long", "float", "dict", "list")),  # default of a defaultdict
)
_MAPPINGS = ("collections.defaultdict", *(f"{module}.AttributeDict" for module in _LIGHTNING))


class Placeholder:
    """Stands for an object whose class is not called; ignores what it is made of."""

    def __new__(cls, *args: Any) -> "Placeholder":
        """Return an empty object."""
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


class PlaceholderMapping:
    """Stands for a kind of mapping; calling it returns an ``OrderedDict``, since the unpickler fills no other."""

    def __new__(cls, *args: Any) -> Any:
        """Return an empty mapping."""
        return OrderedDict()


RECORDS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_VALUES, Placeholder),
    **dict.fromkeys(_MAPPINGS, PlaceholderMapping),
}

"""Find the state dict in a checkpoint: what training scripts and libraries call it, and which of several is taken."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# In the order of timm.models.load_state_dict: averaged weights before those of the last step.
_AVERAGED = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "model_state_dict_ema",
    "params_ema",
    "ema_model",
    "ema",
)
_PLAIN = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "net_state_dict",
    "network",
    "module",
    "weights",
    "params",
    "state",
)
_CONTAINERS = (*_AVERAGED, *_PLAIN)
_DEPTH = 4  # of containers in containers


@dataclasses.dataclass(frozen=True)
class StateDict:
    """A state dict found in a checkpoint.

    Args:
        key: Where it was, such as ``state_dict_ema`` or ``model.state_dict``; empty for the checkpoint itself.
        values: Its mapping of names, to tensors and whatever else is in it.
    """

    key: str
    values: Mapping[str, Any]

    @property
    def known(self) -> bool:
        """Whether it was in a container with a known name, or in none."""
        return self.key.partition(".")[0] in ("", *_CONTAINERS)


def find_state_dicts(checkpoint: Any) -> list[StateDict]:
    """Return the state dicts in a checkpoint, the one to take first; empty if there is none.

    Those in containers with a known name come in timm's order. Only without any, others come in the order of the file.
    """
    found = _find(checkpoint, "", _DEPTH, set())
    return [state for state in found if state.known] or found


def _find(value: Any, key: str, depth: int, seen: set[int]) -> list[StateDict]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value) or id(value) in seen:
        return []
    seen.add(id(value))  # one mapping may be in the file under many names
    known = [name for name in _CONTAINERS if name in value]
    found: list[StateDict] = []
    for name in (*known, *(name for name in value if name not in _CONTAINERS)) if depth else ():
        found += _find(value[name], f"{key}.{name}" if key else name, depth - 1, seen)
    if not found and any(isinstance(item, Tensor) for item in value.values()):
        return [StateDict(key, value)]
    return found

"""Load foreign weights into a model: all of them, or one line that says what does not fit and what to do."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from .names import fit_names
from .read import ForeignWeights, saved_folder_of

_logger = logging.getLogger(__name__)

# Endings of names that tools leave in state dicts, and what to do where they were made.
_TRACES = {
    ".weight_mask": "they are masked by torch.nn.utils.prune: call prune.remove on each layer, and save again",
    ".weight_g": "they are computed by weight_norm: call remove_weight_norm on each layer, and save again",
    ".parametrizations.weight.original0": "they are parametrized: call remove_parametrizations, and save again",
    ".parametrizations.weight.original": "they are parametrized: call remove_parametrizations, and save again",
    "._packed_params": "they are quantized by PyTorch: give the weights before quantization",
    ".zero_point": "they are quantized by PyTorch: give the weights before quantization",
}
_CHECK = "check the architecture, --num-classes and --in-chans"
_BATCHES = ".num_batches_tracked"


def load_weights_(model: nn.Module, name: str, weights: ForeignWeights) -> None:
    """Load all weights of a model, in its dtype; names and shapes are compared before the first tensor is written.

    Prefixes that wrappers put before the names are stripped if all names then match. What was chosen, stripped or
    left out is logged.

    Args:
        model: Model to load them into.
        name: Name of the model in messages.
        weights: Weights as they were read from a file.

    Raises:
        CheckpointError: Names, shapes or dtypes differ from the model's.
    """
    own = model.state_dict()
    fit = fit_names(weights.path, weights.tensors, own.keys())
    state = {key: value for key, value in own.items() if key.endswith(_BATCHES)} | fit.tensors
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    different = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unexpected or different:
        found = (("missing", missing), ("unexpected", unexpected), ("of a different shape", different))
        parts = [f"{len(keys)} {what} (such as {keys[0]:.80})" for what, keys in found if keys]
        raise CheckpointError(
            f"{_place(weights)} does not fit {name}: tensors {', '.join(parts)}; "
            f"{_remedy(model, own, state, missing, unexpected, different)}"
        )
    _check_dtypes(weights, own, state)
    model.load_state_dict(state)
    _notify(weights, fit.removed, fit.left_out)


def require_convolutions(weights: ForeignWeights, name: str) -> None:
    """Refuse weights of adder networks, and of pruned or quantized ones, for a plain CNN: most have names that fit it.

    Args:
        weights: Weights as they were read from a file.
        name: Name of the CNN that they were given for.

    Raises:
        CheckpointError: The weights are not those of a CNN.
    """
    kinds = dict.fromkeys(str(each.get("kind"))[:40] for each in weights.transforms)
    if kinds:
        folder = saved_folder_of(weights.path) or "that it was saved in"
        raise CheckpointError(
            f"{weights.path} holds weights of a network with the transforms {', '.join(kinds)}, expected those of the "
            f"CNN {name}: give the folder {folder} as the model, without --checkpoint"
        )
    adder = next((key for key in weights.tensors if key.rpartition(".")[2] == "adder"), None)
    if adder is not None:
        raise CheckpointError(
            f"{weights.path} holds weights of adder layers ({adder:.80}), expected those of the CNN {name}: "
            f"import them with adderkit import-checkpoint {weights.path} --model {name}"
        )


def _place(weights: ForeignWeights) -> str:
    return f"{weights.container} in {weights.path}" if weights.container else str(weights.path)


def _remedy(
    model: nn.Module,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    different: list[str],
) -> str:
    """Return what the user can do, by what differs."""
    for ending, remedy in _TRACES.items():
        if any(key.endswith(ending) for key in unexpected):
            return remedy
    classifier, first = _names_in(model, "classifier"), _names_in(model, "first_conv")
    if not unexpected and missing and {key.rpartition(".")[0] for key in missing} <= classifier and not different:
        return "it holds no classifier: give weights of a whole model"
    if missing or unexpected:
        return _CHECK
    key, layers = different[0], {key.rpartition(".")[0] for key in different}
    sizes = {(own[key].shape[:1], state[key].shape[:1]) for key in different}
    alike = all(own[key].shape[1:] == state[key].shape[1:] and state[key].ndim for key in different)
    if layers & classifier and len(sizes) == 1 and alike:
        return f"it has {len(state[key])} classes, expected {len(own[key])}: add --num-classes {len(state[key])}"
    if layers <= first and state[key].ndim > 1 and own[key].ndim > 1:
        channels = state[key].shape[1]
        return f"it has {channels} image channels, expected {own[key].shape[1]}: add --in-chans {channels}"
    return _CHECK


def _names_in(model: nn.Module, key: str) -> set[str]:
    """Return the module names that timm's configuration of a model holds under a key."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get(key) or ()
    return {names} if isinstance(names, str) else set(names)


def _check_dtypes(weights: ForeignWeights, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse integers and complex numbers where the model has real ones; they are some quantized form."""
    for key, tensor in own.items():
        if tensor.is_floating_point() and not state[key].is_floating_point():
            raise CheckpointError(
                f"{key} is {state[key].dtype} in {_place(weights)}, expected floating-point weights: "
                "give the weights before quantization"
            )


def _notify(weights: ForeignWeights, removed: str, left_out: tuple[str, ...]) -> None:
    parts = []
    if weights.others:
        parts.append(f"loaded {weights.container}, not {', '.join(weights.others)}")
    if removed:
        parts.append(f"stripped {removed!r} from the names")
    if left_out:
        parts.append(f"ignored {len(left_out)} tensors that the model does not have (such as {left_out[0]:.80})")
    if parts:
        _logger.warning("%s: %s", weights.path, "; ".join(parts))

"""Build timm's feature extractor (``features_only=True``) from a saved model, often a classifier.

timm wraps a network whose weights it has loaded. It cannot wrap one that has been converted since, so the record and
the weights are applied to a wrapped network instead, under the names that its modules have there. What the extractor
does not contain, such as the classifier, is left out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from timm.models import FeatureGraphNet, FeatureHookNet
from timm.models._features import FeatureGetterNet  # not among the public names
from torch import Tensor, nn

from ..conversion.targets import TARGETS
from ..conversion.transforms import PLAIN
from ..errors import CheckpointError
from ..pruning.surgery import PRUNE
from ..record import PATH_LISTS
from .replay import checked_transforms, replay
from .weights import to_file_names, to_model_names

_PREFIXES = {FeatureHookNet: "body.", FeatureGetterNet: "model.", FeatureGraphNet: "graph_module."}


def build_extractor(transforms: Sequence[Mapping[str, Any]], build_base: Callable[[], nn.Module]) -> nn.Module:
    """Build a feature extractor and apply to it the recorded transforms of the network that it is made from.

    Args:
        transforms: Record of the network or of its extractor; read from a checkpoint, hence checked.
        build_base: Build the extractor without the transforms.

    Returns:
        The extractor; its record has its own names.

    Raises:
        CheckpointError: A transform is malformed, of a kind that an extractor cannot have, or does not fit.
    """
    checked = checked_transforms(transforms)
    for transform in checked:
        if transform["kind"] not in (*TARGETS, PLAIN, PRUNE):
            raise CheckpointError(
                f"the checkpoint has a {transform['kind']!r} transform, expected a float network for features_only: "
                "build the extractor of the network that was quantized"
            )
    extractor = build_base()
    names = _names(extractor, (path for path, _ in extractor.named_modules()))
    names |= _names(extractor, (path for path, _ in extractor.named_parameters()))
    renamed = [_renamed(transform, names) for transform in checked]
    return replay([transform for transform in renamed if transform is not None], lambda: extractor)


def extractor_weights(extractor: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the weights of an extractor, under its own names, from those of the network that it is made from.

    Args:
        extractor: The extractor, with all transforms applied.
        state: Weights of the network or of its extractor, as in their file.
        source: Name of the file or folder in messages.

    Raises:
        CheckpointError: A tensor is missing.
    """
    own = to_file_names(extractor, extractor.state_dict())
    names = _names(extractor, own)
    found = {names[_key(name)]: tensor for name, tensor in state.items() if _key(name) in names}
    missing = [name for name in own if name not in found]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of the {len(own)} tensors of the feature extractor, such as {missing[0]}: "
            "ask for features that the saved model computes (out_indices), in the form in which it was saved"
        )
    return to_model_names(extractor, found)


def _names(extractor: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Map the key of each path to the path; both that inside the wrapper and that with its prefix are known."""
    prefix = next((prefix for kind, prefix in _PREFIXES.items() if isinstance(extractor, kind)), "")
    found: dict[str, str] = {}
    for path in paths:
        found[_key(path)] = path
        if prefix and path.startswith(prefix):
            found[_key(path.removeprefix(prefix))] = path
    return found


def _key(path: str) -> str:
    """Return a path in the form that it has in any extractor, some of which write ``stages_0`` for ``stages.0``."""
    return path.replace(".", "_")


def _renamed(transform: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return a transform under the extractor's names, or ``None`` if it concerns nothing in the extractor."""
    if transform["kind"] == PRUNE:
        shapes = {names[_key(path)]: shape for path, shape in transform["shapes"].items() if _key(path) in names}
        return {**transform, "shapes": shapes} if shapes else None
    lists = {
        key: [names[_key(path)] for path in transform[key] if _key(path) in names]
        for key in PATH_LISTS
        if key in transform
    }
    others = {key: value for key, value in transform.items() if key not in lists}
    return {**others, **{key: paths for key, paths in lists.items() if paths}} if lists["modules"] else None

"""Rebuild a model from its base and the transforms in its record: one row for each kind of transform."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..conversion.reparameterize import REPARAMETERIZE, apply_reparameterize_, check_reparameterize
from ..conversion.targets import TARGETS
from ..conversion.transforms import PLAIN, apply_conversion_, check_conversion
from ..errors import CheckpointError, NoModuleMatchedError
from ..pruning.surgery import PRUNE, apply_prune_, check_prune
from ..quantization.fake_quantize import FAKE_QUANTIZE, apply_fake_quantize_, check_fake_quantize
from ..quantization.record import QUANTIZE, check_quantize, network_from
from ..record import set_transforms_


@dataclasses.dataclass(frozen=True)
class Kind:
    """Functions that check and replay transforms of one kind.

    Args:
        check: Raise ``CheckpointError`` if a transform is malformed, without knowing the model.
        apply: Apply a checked transform to a model, in place.
        rebuild: Build the transformed model from the transform alone, for a kind that does not need the base model.
        must_be_last: Whether no transform may follow.
    """

    check: Callable[[Mapping[str, Any]], None]
    apply: Callable[[nn.Module, Mapping[str, Any]], None] | None = None
    rebuild: Callable[[Mapping[str, Any]], nn.Module] | None = None
    must_be_last: bool = False


_CONVERSION = Kind(check_conversion, apply_conversion_)
KINDS: dict[str, Kind] = {
    REPARAMETERIZE: Kind(check_reparameterize, apply_reparameterize_),
    PLAIN: _CONVERSION,
    PRUNE: Kind(check_prune, apply_prune_),
    FAKE_QUANTIZE: Kind(check_fake_quantize, apply_fake_quantize_, must_be_last=True),
    QUANTIZE: Kind(check_quantize, rebuild=network_from, must_be_last=True),
}


def all_kinds() -> dict[str, Kind]:
    """Return the kinds of transforms by name: every target of a conversion, and ``KINDS``."""
    return {**dict.fromkeys(TARGETS, _CONVERSION), **KINDS}


def replay(transforms: Iterable[Mapping[str, Any]], build_base: Callable[[], nn.Module]) -> nn.Module:
    """Build a model and apply recorded transforms to it.

    Args:
        transforms: Record as ``transforms_of`` returns it; read from a checkpoint, hence checked.
        build_base: Build the base model. Not called if the transforms are malformed, or if the last one holds the
            whole model.

    Returns:
        The model, with the transforms as its record.

    Raises:
        CheckpointError: A transform is malformed, unknown, or does not fit the base model.
    """
    checked = checked_transforms(transforms)
    known = all_kinds()
    kinds = [known[transform["kind"]] for transform in checked]
    if kinds and kinds[-1].rebuild is not None:
        model = kinds[-1].rebuild(checked[-1])
    else:
        model = build_base()
        for kind, transform in zip(kinds, checked, strict=True):
            assert kind.apply is not None
            try:
                kind.apply(model, transform)
            except NoModuleMatchedError as error:
                raise CheckpointError(
                    f"the {transform['kind']!r} transform in the checkpoint does not fit its base model: {error}"
                ) from error
    set_transforms_(model, checked)
    return model


def checked_transforms(transforms: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return recorded transforms that may come from somebody else, after checking each.

    Raises:
        CheckpointError: A transform is malformed or unknown.
    """
    if not isinstance(transforms, Iterable):
        raise CheckpointError(f"transforms is {transforms!r:.80} in the checkpoint, expected a list")
    result, known = list(transforms), all_kinds()
    for transform in result:
        kind = transform.get("kind") if isinstance(transform, Mapping) else None
        if not isinstance(kind, str) or kind not in known:
            raise CheckpointError(
                f"unknown transform {transform!r:.80} in the checkpoint, expected the kind "
                f"{', '.join(map(repr, known))}: install a newer adderkit"
            )
        known[kind].check(transform)
    for transform in result[:-1]:
        if known[transform["kind"]].must_be_last:
            raise CheckpointError(
                f"the {transform['kind']!r} transform is not the last in the checkpoint; nothing can follow it"
            )
    return result

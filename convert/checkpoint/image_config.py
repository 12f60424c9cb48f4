"""Check how a saved configuration says that images are prepared, before anything is computed with it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_LARGEST_SIDE = 1 << 14  # pixels, or channels
_MOST_CLASSES = 1 << 24
_LARGEST_NUMBER = 1e6  # of means and deviations; neither infinite nor NaN
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random", "")
_CROPS = ("center", "squash", "border")


def check_image_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse image settings of the wrong type or of an absurd size, which somebody else may have written.

    Args:
        config: Contents of the file.
        path: The ``config.json``, for the message.

    Raises:
        CheckpointError: A value is of no use; the message names it.
    """
    images = config.get("pretrained_cfg", {})
    if not isinstance(images, Mapping):
        raise CheckpointError(f"pretrained_cfg is {images!r:.80} in {path}, expected an object")
    settings = {**images, **({"num_classes": config["num_classes"]} if "num_classes" in config else {})}
    for key, (check, expected) in _SETTINGS.items():
        value = settings.get(key)
        if value is not None and not check(value):
            raise CheckpointError(f"{key} is {value!r:.80} in {path}, expected {expected}")


def _is_size(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(side) is int and 1 <= side <= _LARGEST_SIDE for side in value)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _LARGEST_SIDE and all(map(_is_number, value))


def _are_positive(value: Any) -> bool:
    return _are_numbers(value) and min(value) > 0


_Check = tuple[Callable[[Any], bool], str]
_SIZE: _Check = (_is_size, f"three whole numbers from 1 to {_LARGEST_SIDE}: channels, height and width")
_SHARE: _Check = (lambda value: _is_number(value) and 0 < value <= 8, "a number above 0, up to 8")
_SETTINGS: Mapping[str, _Check] = {
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "min_input_size": _SIZE,
    "fixed_input_size": (lambda value: isinstance(value, bool), "true or false"),
    "crop_pct": _SHARE,
    "test_crop_pct": _SHARE,
    "crop_mode": (lambda value: value in _CROPS, f"one of {', '.join(_CROPS)}"),
    "interpolation": (lambda value: value in _INTERPOLATIONS, f"one of {', '.join(_INTERPOLATIONS[:-1])}"),
    "mean": (_are_numbers, "a list of numbers"),
    "std": (_are_positive, "a list of positive numbers"),
    "num_classes": (
        lambda value: type(value) is int and 0 <= value <= _MOST_CLASSES,
        f"a whole number from 0 to {_MOST_CLASSES}",
    ),
}

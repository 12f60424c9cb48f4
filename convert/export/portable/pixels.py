"""What pixels stand for, which a plan does not know."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Normalization:
    """A pixel between 0 and 255 stands for the real value ``(pixel / 255 - mean[c]) / std[c]``.

    Args:
        mean: Of each channel.
        std: Of each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

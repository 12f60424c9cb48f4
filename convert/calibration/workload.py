"""Estimate the work of a calibration's phases, so that progress and the time left count the whole."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from torch import nn

from ..graph.layers import Layer
from .config import CalibrationConfig

Progress = Callable[[str, int, int], None]
# Progress is reported in thousandths of the whole.
WHOLE = 1000
# Windows of a step of a layer's fit, forward and backward, and steps that the choice of the start is worth.
_FIT_WINDOWS, _START_STEPS = 2 * 1024, 32
# Passes of the joint fit for each image of a step: the teacher's, the student's, and two backward.
_JOINT_PASSES, _JOINT_IMAGES = 4, 64


class Workload:
    """Distances and products of each phase of a calibration, estimated.

    Args:
        student: The converted model.
        layers: Its adder layers in order of execution.
        config: Settings of the calibration.
        images: Number of images.
        progress: Called as ``progress(what, done, total)``, with ``total`` 1000.
    """

    def __init__(
        self, student: nn.Module, layers: Sequence[Layer], config: CalibrationConfig, images: int, progress: Progress
    ) -> None:
        self._progress = progress
        filters = [student.get_parameter(f"{layer.path}.weight").numel() for layer in layers]
        terms = [math.prod(layer.output_shape[2:]) * size for layer, size in zip(layers, filters, strict=True)]
        fit = _FIT_WINDOWS * (config.steps + _START_STEPS)
        each = (fit * size + 2 * images * one for size, one in zip(filters, terms, strict=True))
        self._after_layers = list(accumulate(each, initial=0))
        self._step = _JOINT_PASSES * min(images, _JOINT_IMAGES) * sum(terms)
        self._before_statistics = self._after_layers[-1] + config.matching_steps * self._step
        self._all = self._before_statistics + images * sum(terms)

    def report(self, what: str, done: int, total: int) -> None:
        """Report progress within a phase.

        Args:
            what: What is next: a layer's path, ``layers``, ``all layers`` for the joint fit, or ``statistics``.
            done: Layers or steps of the phase that are done.
            total: Their number.
        """
        if what == "statistics":
            work = self._all if done == total else self._before_statistics
        elif what == "all layers":
            work = self._after_layers[-1] + done * self._step
        else:
            work = self._after_layers[done]
        self._progress(what, round(WHOLE * work / self._all), WHOLE)

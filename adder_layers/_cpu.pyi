"""The C++ extension. Tensors are in the CPU's memory and contiguous unless said otherwise; capsules are DLPack's."""

import enum
from collections.abc import Sequence

from torch import Tensor
from typing_extensions import CapsuleType

Array = Tensor | CapsuleType
Pair = tuple[int, int]  # (height, width)

def available() -> list[str]: ...
def integer_available() -> list[str]: ...

# input, output, grad and result are float32 of any strides; input and result have the same ones. The weight is
# [T, O, C / groups, kh, kw]; term j has the factor 2^-j. The result holds only
# if True is returned: input and weight are finite, and below 2^115, so that sums cannot overflow.
def forward(
    isa: str,
    input: Array,
    weight: Array,
    output: Array,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    threads: int,
) -> bool: ...
def input_grad(
    isa: str,
    grad: Array,
    input: Array,
    weight: Array,
    result: Array,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    threads: int,
) -> bool: ...

class Kind(enum.Enum):
    adder = ...
    convolution = ...
    window_sum = ...
    window_largest = ...
    linear = ...

class Activation:
    # zero_point is uint8 [channels]; offset counts bytes in the arena of one image.
    def __init__(
        self, *, channels: int, height: int, width: int, halo: Pair, offset: int, zero_point: Array
    ) -> None: ...

class StepConfig:
    # input, output and residual are numbers of activations.
    def __init__(
        self,
        *,
        kind: Kind,
        input: int,
        output: int | None,
        residual: int | None,
        filters: int,
        groups: int,
        terms: int,
        quant_max: int,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> None: ...

class StepFactors:
    # Each is int64 [filters].
    def __init__(
        self,
        *,
        multiplier: Array | None = None,
        offset: Array | None = None,
        shift: Array | None = None,
        scale_exponent: Array | None = None,
        residual: Array | None = None,
    ) -> None: ...

class Network:
    def __init__(self, isa: str, *, activations: Sequence[Activation], arena_bytes: int) -> None: ...
    # weight is uint8 or int8 [filters, kh, kw, channels / groups].
    def add(self, config: StepConfig, weight: Array | None, factors: StepFactors) -> None: ...
    # images are uint8 [N, H, W, C], seconds float64 [steps + 1].
    def run(self, images: Array, output: Array, *, threads: int, seconds: Array | None = None) -> None: ...
    # images are float32 [N, C, H, W].
    def run_float(self, images: Array, output: Array, *, scale_reciprocal: float, threads: int) -> None: ...

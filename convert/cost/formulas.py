"""Cost of each aten operator: multiplications, additions and values moved, computed from shapes alone.

Conventions: A product ``x·w`` with its accumulation is one multiplication and one addition, a distance ``|x - w|`` with
its accumulation two additions (AdderNet, arXiv 1912.13200, tables 2 and 3). A bias is the initial value of the
accumulator and costs nothing. Reading a sign is free, so ``abs`` and ReLU are free; comparing two values is a
subtraction and counts as one addition. Division by a constant is a multiplication. Functions without an entry in the
energy table (exp, square root, division of two values) are counted separately.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .operations import Operations

BATCH_NORM_NAMES = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})


@dataclasses.dataclass(frozen=True)
class Tally:
    """Cost of one call of an operator.

    Args:
        kind: Kind of the operator: a weight layer, ``normalization``, ``activation``, ``gate``, …
        operations: Its operations.
        moved: Number of activations read and written; 0 for an operator that is fused into the layer before it.
        weights: Number of weight values, for weight layers.
        before: Operations as a convolution, for adder layers.
        terms: Terms of each weight, for adder layers.
    """

    kind: str
    operations: Operations = dataclasses.field(default_factory=Operations)
    moved: int = 0
    weights: int = 0
    before: Operations | None = None
    terms: int = 1


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an operator.

    Args:
        name: Name of the operator, without namespace and without the underscore of the in-place form.
        arguments: Positional arguments.
        keywords: Keyword arguments.
        output: First tensor of the result.
        activations: Tensors among the arguments that depend on the image.
    """

    name: str
    arguments: Sequence[Any]
    keywords: dict[str, Any]
    output: Tensor
    activations: Sequence[Tensor]

    def argument(self, position: int, default: Any = None) -> Any:
        """Return a positional argument, or the default if it was not given."""
        return self.arguments[position] if len(self.arguments) > position else default

    @property
    def size(self) -> int:
        """Number of values in the output."""
        return self.output.numel()

    @property
    def read(self) -> int:
        """Number of values in the input activations."""
        return sum(tensor.numel() for tensor in self.activations)


def tally(call: Call) -> Tally | None:
    """Return the cost of a call, or ``None`` for an operator without a formula."""
    if call.name in _FORMULAS:
        return _FORMULAS[call.name](call)
    if call.name.startswith("_scaled_dot_product") or call.name.startswith("_efficient_attention"):
        return _attention(call)
    if call.name in _POINTWISE:
        kind, scalings, sums, functions = _POINTWISE[call.name]
        size = call.size
        operations = Operations(scalings=scalings * size, sums=sums * size, functions=functions * size)
        # An operation on one activation is fused into the layer before it; a second activation has to be read.
        return Tally(kind, operations, moved=sum(sorted(tensor.numel() for tensor in call.activations)[:-1]))
    if call.name in _REDUCTIONS:
        scalings, sums, functions, scalings_out, functions_out = _REDUCTIONS[call.name]
        values, size = call.read, call.size
        operations = Operations(
            scalings=scalings * values + scalings_out * size,
            sums=sums * values,
            functions=functions * values + functions_out * size,
        )
        kind = "softmax" if "softmax" in call.name else "pooling"
        return Tally(kind, operations, moved=values + size)
    return Tally("") if call.name in _FREE else None


def _convolution(call: Call) -> Tally:
    weight, transposed = call.arguments[1], call.arguments[6]
    # weight is [O, C / groups, kh, kw]; transposed, [C, O / groups, kh, kw], and each input value meets its row.
    values = call.arguments[0].numel() if transposed else call.size
    return _layer(call, "convolution", Operations(products=values * weight[0].numel()), weight.numel())


def _adder(call: Call) -> Tally:
    weight = call.arguments[1]  # [O, C / groups, kh, kw], or [O, C / groups, T, kh, kw] with T terms
    terms = weight.shape[2] if weight.ndim == 5 else 1
    distances = call.size * weight[0].numel()
    # The sums of the terms are combined by shifts, which are wiring, and additions.
    operations = Operations(distances=distances, sums=call.size * (terms - 1))
    counted = _layer(call, "adder", operations, weight.numel())
    return dataclasses.replace(counted, before=Operations(products=distances // terms), terms=terms)


def _matrix_product(call: Call) -> Tally:
    left, right = call.arguments[-2:] if call.name in ("addmm", "baddbmm", "addmv") else call.arguments[:2]
    products = Operations(products=call.size * left.shape[-1])
    if len(call.activations) > 1:
        return _layer(call, "matrix product", products, 0)
    return _layer(call, "linear", products, left.numel() + right.numel() - call.read)


def _layer(call: Call, kind: str, operations: Operations, weights: int) -> Tally:
    return Tally(kind, operations, moved=call.read + call.size, weights=weights)


def _attention(call: Call) -> Tally:
    query, key, value = call.arguments[:3]  # [N, heads, L, E], [N, heads, S, E], [N, heads, S, V]
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    # Scores and their weighted sum, the scale, and the softmax as in _REDUCTIONS.
    operations = Operations(
        products=scores * (query.shape[-1] + value.shape[-1]), scalings=2 * scores, sums=3 * scores, functions=scores
    )
    return _layer(call, "matrix product", operations, 0)


def _batch_norm(call: Call) -> Tally:
    if call.arguments[5]:  # training mode: statistics of the image itself
        return _measured_norm(call)
    return Tally("normalization", Operations(scalings=call.size, sums=call.size))


def _measured_norm(call: Call) -> Tally:
    """Count mean, difference, square, its mean, scale and affine: 3 multiplications and 4 additions per value."""
    return Tally("normalization", Operations(scalings=3 * call.size, sums=4 * call.size), moved=call.read + call.size)


def _max_pool(call: Call) -> Tally:
    comparisons = call.size * (_window(call, call.name) - 1)
    return Tally("pooling", Operations(sums=comparisons), moved=call.read + call.size)


def _average_pool(call: Call) -> Tally:
    sums = call.size * _window(call, call.name)
    return Tally("pooling", Operations(scalings=call.size, sums=sums), moved=call.read + call.size)


def _window(call: Call, name: str) -> int:
    dimensions = next(int(digit) for digit in reversed(name.removesuffix("_with_indices")) if digit.isdigit())
    kernel = list(call.arguments[1])
    return math.prod(kernel) if len(kernel) == dimensions else int(kernel[0]) ** dimensions


def _sum_of_two(call: Call) -> Tally:
    scaled = call.keywords.get("alpha", 1) not in (1, -1)
    return _binary(call, "residual", Operations(scalings=call.size * scaled, sums=call.size))


def _product_of_two(call: Call) -> Tally:
    return _binary(call, "gate", Operations(scalings=call.size))


def _quotient(call: Call) -> Tally:
    divided = any(call.argument(1) is tensor for tensor in call.activations)
    return _binary(call, "gate", Operations(functions=call.size) if divided else Operations(scalings=call.size))


def _binary(call: Call, kind: str, operations: Operations) -> Tally:
    """Count an operator on two activations, a residual or a gate, which reads the smaller one."""
    if len(call.activations) < 2:
        return Tally("element-wise", operations)
    return Tally(kind, operations, moved=min(tensor.numel() for tensor in call.activations))


def _clamp(call: Call) -> Tally:
    """Count an addition for each bound except zero: comparing with zero only reads a sign."""
    defaults = (-1, 1) if call.name == "hardtanh" else (None, None)
    bounds = [call.argument(position, default) for position, default in zip((1, 2), defaults, strict=True)]
    bounds += [call.keywords.get("min"), call.keywords.get("max")]
    compared = sum(isinstance(bound, Tensor) or bool(bound) for bound in bounds)
    return Tally("activation", Operations(sums=compared * call.size))


def _power(call: Call) -> Tally:
    exponent = call.argument(1)
    if isinstance(exponent, int | float) and exponent in (1, 2, 3, 4):
        steps = {1: 0, 2: 1, 3: 2, 4: 2}[int(exponent)]
        return Tally("element-wise", Operations(scalings=steps * call.size))
    return Tally("element-wise", Operations(functions=call.size))


_FORMULAS: dict[str, Callable[[Call], Tally]] = {
    "convolution": _convolution,
    "adder_conv2d": _adder,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"), _matrix_product),
    **dict.fromkeys(BATCH_NORM_NAMES, _batch_norm),
    **dict.fromkeys(("native_layer_norm", "native_group_norm", "_fused_rms_norm"), _measured_norm),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), _max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _average_pool),
    **dict.fromkeys(("add", "sub", "rsub"), _sum_of_two),
    "mul": _product_of_two,
    "div": _quotient,
    **dict.fromkeys(("clamp", "hardtanh", "clamp_min", "clamp_max"), _clamp),
    "pow": _power,
}

# Kind, then multiplications, additions and functions per value of the output.
_POINTWISE = {
    **dict.fromkeys(("relu", "abs", "neg", "sign", "where", "threshold"), ("activation", 0, 0, 0)),
    **dict.fromkeys(("leaky_relu", "_prelu_kernel", "prelu"), ("activation", 1, 0, 0)),
    "hardswish": ("activation", 2, 2, 0),  # x · clamp(x + 3, 0, 6) / 6
    "hardsigmoid": ("activation", 1, 2, 0),
    "silu": ("activation", 1, 0, 1),
    "gelu": ("activation", 3, 1, 1),  # x / 2 · (1 + erf(x / √2))
    "mish": ("activation", 1, 1, 3),  # x · tanh(log(1 + exp(x)))
    "softplus": ("activation", 0, 1, 2),
    "elu": ("activation", 1, 1, 1),
    **dict.fromkeys(("sigmoid", "tanh", "erf"), ("activation", 0, 0, 1)),
    **dict.fromkeys(("exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos"), ("element-wise", 0, 0, 1)),
    **dict.fromkeys(("maximum", "minimum", "lt", "gt", "le", "ge", "eq", "ne"), ("element-wise", 0, 1, 0)),
    "addcmul": ("element-wise", 1, 1, 0),
    "lerp": ("element-wise", 1, 2, 0),
}

# Multiplications, additions and functions per input value; multiplications and functions per output value.
_REDUCTIONS = {
    "mean": (0, 1, 0, 1, 0),
    **dict.fromkeys(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"), (0, 1, 0, 1, 0)),
    **dict.fromkeys(("sum", "max", "amax", "min", "amin", "argmax", "cumsum"), (0, 1, 0, 0, 0)),
    **dict.fromkeys(("adaptive_max_pool2d", "adaptive_max_pool3d"), (0, 1, 0, 0, 0)),
    **dict.fromkeys(("var", "var_mean"), (1, 3, 0, 1, 0)),
    "std": (1, 3, 0, 1, 1),
    "linalg_vector_norm": (1, 1, 0, 0, 1),
    # Maximum, difference, exp, sum, and multiplication by the reciprocal of the sum.
    **dict.fromkeys(("_softmax", "_safe_softmax"), (1, 3, 1, 0, 0)),
    "_log_softmax": (0, 4, 1, 0, 0),
}

# Operators that only move values; views are recognized separately.
_FREE = frozenset(
    {
        "_reshape_alias",
        "_to_copy",
        "_unsafe_view",
        "alias",
        "as_strided",
        "bitwise_not",
        "cat",
        "channel_shuffle",
        "clone",
        "constant_pad_nd",
        "copy",
        "detach",
        "empty_like",
        "expand",
        "fill",
        "flip",
        "gather",
        "im2col",
        "index",
        "index_select",
        "native_channel_shuffle",
        "native_dropout",
        "new_empty",
        "new_ones",
        "new_zeros",
        "ones_like",
        "pixel_shuffle",
        "pixel_unshuffle",
        "reflection_pad2d",
        "repeat",
        "replication_pad2d",
        "roll",
        "stack",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "zero",
        "zeros_like",
    }
)


def call_of(
    operator: torch._ops.OpOverload, arguments: Sequence[Any], keywords: dict[str, Any], output: Tensor, known: Any
) -> Call:
    """Describe a call of an operator for the formulas.

    Args:
        operator: The operator that was called.
        arguments: Positional arguments; lists of tensors among them are searched.
        keywords: Keyword arguments.
        output: First tensor of the result.
        known: Container of the tensors that depend on the image.
    """
    name = operator._schema.name.split("::")[1]
    name = name[:-1] if name.endswith("_") else name
    activations = [tensor for tensor in tensors_in((*arguments, *keywords.values())) if tensor in known]
    return Call(name, arguments, keywords, output, activations)


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among an operator's arguments or results, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []

"""The steps of a plan in C: the constants of each step, and the call of its kernel."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from typing_extensions import assert_never

from ....adder_layers.geometry import Window
from ....adder_layers.integer.plan import (
    Activation,
    Adder,
    AveragePool,
    Convolution,
    Filters,
    IntegerPlan,
    Linear,
    MaxPool,
    Requantization,
    Rescale,
    Step,
    powers_of_two,
    requantization_of,
    step_tensors,
)
from .arena import Arena
from .c_tables import Table, shift_codes

Windowed: TypeAlias = Adder | Convolution | MaxPool | AveragePool


@dataclasses.dataclass(frozen=True)
class CSteps:
    """Writes the steps of one plan.

    Args:
        plan: The network.
        prefix: Prefix of all C names.
        arena: Positions of the activations.
    """

    plan: IntegerPlan
    prefix: str
    arena: Arena

    def tables(self) -> Iterator[Table]:
        """Yield all arrays of numbers."""
        for number in padded_activations(self.plan):
            zero_point = self.plan.activations[number].zero_point
            yield Table(self._name("zero_point", number), zero_point, f"the padded pixel of activation {number}")
        for index, step in enumerate(self.plan.steps):
            for name, values in step_tensors(step).items():
                as_shifts = name.endswith("multiplier") and by_shifts(step)
                shape = "".join(f"[{size}]" for size in values.shape)
                yield Table(
                    self._name(name, index),
                    shift_codes(values) if as_shifts else values,
                    f"step {index}, {name.replace('_', ' ')} {shape}{', k + 1 for 2^k' if as_shifts else ''}",
                )

    def structs(self) -> Iterator[str]:
        """Yield the structs that kernels take by address."""
        for index, step in enumerate(self.plan.steps):
            match step:
                case Adder() | Convolution():
                    yield self._constant("layer", index, self._layer(step))
                case MaxPool() | AveragePool():
                    yield self._constant("window", index, self._window(step))
                case Rescale() | Linear():
                    pass
                case _:
                    assert_never(step)
            requantization = requantization_of(step)
            if requantization is not None:
                kind = "requantization" + variant(by_shifts(step))
                yield self._constant(kind, index, self._requantization(index, requantization))

    def calls(self) -> Iterator[str]:
        """Yield a comment and a call for each step."""
        activations = self.plan.activations
        for index, (step, path) in enumerate(zip(self.plan.steps, self.plan.paths, strict=True)):
            source = activations[step.input]
            target = f"{len(step.offset)} logits" if isinstance(step, Linear) else size(activations[step.output])
            yield f"    /* {index} {in_comment(path)}: {step.kind.replace('_', ' ')}, {size(source)} to {target} */\n"
            arguments = ", ".join(self._arguments(index, step, source))
            yield wrapped(f"    {self.prefix}_{kernel(step)}{variant(by_shifts(step))}({arguments});")

    def _name(self, what: str, index: int) -> str:
        return f"{self.prefix}_{what}_{index}"

    def _constant(self, kind: str, index: int, value: str) -> str:
        return wrapped(f"static const {self.prefix}_{kind} {self._name(kind, index)} = {value};")

    def _layer(self, step: Adder | Convolution) -> str:
        fields = {
            "window": self._window(step),
            "groups": step.groups,
            "filters": len(step.weight) // step.groups,
            "channels": step.weight.shape[-1],
            "zero_point": self._name("zero_point", step.input) if any(step.window.padding) else "NULL",
        }
        return braces(fields)

    def _requantization(self, index: int, requantization: Requantization) -> str:
        tables = ("multiplier", "offset", "shift", "scale_exponent", "residual_multiplier")
        fields = {name: self._name(name, index) for name in tables} | {"quant_max": str(requantization.quant_max)}
        if requantization.residual is None:
            fields["residual_multiplier"] = "NULL"
        return braces(fields)

    def _window(self, step: Windowed) -> str:
        source, target, window = self.plan.activations[step.input], self.plan.activations[step.output], step.window
        fields = window_distances(window, source) | {"out_height": target.height, "out_width": target.width}
        return braces(fields)

    def _arguments(self, index: int, step: Step, source: Activation) -> list[str]:
        read = self._memory(step.input)
        match step:
            case Adder() | Convolution():
                terms = [str(step.terms)] if step.terms > 1 else []
                first = [f"&{self._name('layer', index)}", *terms, self._name("weight", index)]
                return [*first, *self._requantized(index, step)]
            case AveragePool():
                return [f"&{self._name('window', index)}", str(source.channels), *self._requantized(index, step)]
            case Rescale():
                return [str(source.height * source.width), str(source.channels), *self._requantized(index, step)]
            case MaxPool():
                first = [f"&{self._name('window', index)}", str(source.channels)]
                return [*first, read, self._memory(step.output)]
            case Linear():
                classes, values = step.weight.shape
                tables = [self._name(name, index) for name in ("weight", "multiplier", "offset", "shift")]
                return [str(classes), str(values), *tables, read, "logits"]
            case _:
                assert_never(step)

    def _requantized(self, index: int, step: Adder | Convolution | AveragePool | Rescale) -> list[str]:
        """Return the arguments that all kernels with a requantization have: factors, input, residual and output."""
        number = step.requantization.residual
        residual = "NULL" if number is None else self._memory(number)
        factors = f"&{self._name('requantization' + variant(by_shifts(step)), index)}"
        return [factors, self._memory(step.input), residual, self._memory(step.output)]

    def _memory(self, number: int) -> str:
        if number == 0:
            return "image"
        offset = self.arena.offsets.get(number)
        return "output" if offset is None else f"{self.prefix}_arena + {offset}"


def kernel(step: Step) -> str:
    """Return the name of the template and of the C function that compute a step."""
    return "adder_terms" if isinstance(step, Adder) and step.terms > 1 else step.kind


def by_shifts(step: Step) -> bool:
    """Return whether a step requantizes by shifts alone, because all multipliers are 0 or powers of two."""
    return requantization_of(step) is not None and powers_of_two(step)


def padded_activations(plan: IntegerPlan) -> list[int]:
    """Return the numbers of the activations whose zero point is read, because a layer pads them."""
    readers = [step for step in plan.steps if isinstance(step, Filters) and any(step.window.padding)]
    return sorted({step.input for step in readers})


def window_distances(window: Window, source: Activation) -> dict[str, int]:
    """Return the sizes of a window for ``templates/windows.c``, in bytes of its input ``[H, W, C]``."""
    line = source.width * source.channels
    return {
        "size": source.height * line,
        "line": line,
        "rows": window.kernel[0],
        "columns": window.kernel[1],
        "top": -window.padding[0] * line,
        "left": -window.padding[1] * source.channels,
        "down": window.stride[0] * line,
        "right": window.stride[1] * source.channels,
        "below": window.dilation[0] * line,
        "beside": window.dilation[1] * source.channels,
    }


def variant(shifts: bool) -> str:
    """Return the suffix of the names of kernels that requantize by shifts."""
    return "_by_shifts" if shifts else ""


def braces(fields: Mapping[str, object]) -> str:
    """Return a struct's initializer, by field name."""
    return "{" + ", ".join(f".{name} = {value}" for name, value in fields.items()) + "}"


def size(activation: Activation) -> str:
    """Return ``HxWxC``."""
    return f"{activation.height}x{activation.width}x{activation.channels}"


def wrapped(line: str) -> str:
    """Break a statement after commas into lines of at most 120 characters."""
    first, *rest = line.split(", ")
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    lines = [first]
    for part in rest:
        if len(lines[-1]) + len(part) + 3 <= 120:
            lines[-1] += f", {part}"
        else:
            lines[-1] += ","
            lines.append(indent + part)
    return "\n".join(lines) + "\n"


def in_comment(text: str) -> str:
    """Replace everything in a foreign text, such as a layer's path, that could end a C comment."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._- ") else "_" for letter in text)

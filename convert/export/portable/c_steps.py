"""The steps of a plan in C: for each the constants it points to, and the call of its kernel."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from ....adder_layers.geometry import Window
from ....adder_layers.integer.plan import (
    Activation,
    Adder,
    AveragePool,
    Convolution,
    IntegerPlan,
    Linear,
    MaxPool,
    Requantization,
    Rescale,
    Step,
    requantization_of,
    step_tensors,
)
from .arena import Arena
from .c_tables import Table
from .constants import by_shifts, padded, shift_codes

Windowed: TypeAlias = Adder | Convolution | MaxPool | AveragePool


@dataclasses.dataclass(frozen=True)
class CSteps:
    """Writes the steps of one plan.

    Args:
        plan: The network.
        prefix: What all C names begin with.
        arena: Where the activations lie.
    """

    plan: IntegerPlan
    prefix: str
    arena: Arena

    def tables(self) -> Iterator[Table]:
        """All arrays of numbers."""
        for number in padded(self.plan):
            zero = self.plan.activations[number].zero
            yield Table(self._name("zero", number), zero, f"the padded pixel of activation {number}")
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
        """The constants that kernels take by address."""
        for index, step in enumerate(self.plan.steps):
            if isinstance(step, Adder | Convolution):
                yield self._constant("layer", index, self._layer(index, step))
            elif isinstance(step, MaxPool | AveragePool):
                yield self._constant("window", index, self._window(step))
            requantization = requantization_of(step)
            if requantization is not None:
                kind = "requantization" + variant(by_shifts(step))
                yield self._constant(kind, index, self._requantization(index, requantization))

    def calls(self) -> Iterator[str]:
        """A comment and a call for each step."""
        activations = self.plan.activations
        for index, (step, path) in enumerate(zip(self.plan.steps, self.plan.paths, strict=True)):
            source = activations[step.input]
            target = f"{len(step.offset)} logits" if isinstance(step, Linear) else size(activations[step.output])
            yield f"    /* {index} {in_comment(path)}: {step.kind.replace('_', ' ')}, {size(source)} to {target} */\n"
            arguments = ", ".join(self._arguments(index, step, source))
            yield wrapped(f"    {self.prefix}_{step.kind}{variant(by_shifts(step))}({arguments});")

    def _name(self, what: str, index: int) -> str:
        return f"{self.prefix}_{what}_{index}"

    def _constant(self, kind: str, index: int, value: str) -> str:
        return wrapped(f"static const {self.prefix}_{kind} {self._name(kind, index)} = {value};")

    def _layer(self, index: int, step: Adder | Convolution) -> str:
        fields = {
            "window": self._window(step),
            "groups": step.groups,
            "filters": len(step.weight) // step.groups,
            "channels": step.weight.shape[3],
            "zero": self._name("zero", step.input) if any(step.window.padding) else "NULL",
        }
        return braces(fields)

    def _requantization(self, index: int, requantization: Requantization) -> str:
        tables = ("multiplier", "offset", "shift", "exponent", "residual_multiplier")
        fields = {name: self._name(name, index) for name in tables} | {"levels": str(requantization.levels)}
        if requantization.residual is None:
            fields["residual_multiplier"] = "NULL"
        return braces(fields)

    def _window(self, step: Windowed) -> str:
        source, target, window = self.plan.activations[step.input], self.plan.activations[step.output], step.window
        fields = window_distances(window, source) | {"out_height": target.height, "out_width": target.width}
        return braces(fields)

    def _arguments(self, index: int, step: Step, source: Activation) -> list[str]:
        of_step = {name: self._name(name, index) for name in ("weight", "multiplier", "offset", "shift")}
        if isinstance(step, Linear):
            classes, values = step.weight.shape
            return [str(classes), str(values), *of_step.values(), self._memory(step.input), "logits"]
        requantization = requantization_of(step)
        first = {
            Adder: [f"&{self._name('layer', index)}", of_step["weight"]],
            Convolution: [f"&{self._name('layer', index)}", of_step["weight"]],
            Rescale: [str(source.height * source.width), str(source.channels)],
            MaxPool: [f"&{self._name('window', index)}", str(source.channels)],
            AveragePool: [f"&{self._name('window', index)}", str(source.channels)],
        }[type(step)]
        if requantization is None:
            return [*first, self._memory(step.input), self._memory(step.output)]
        residual = "NULL" if requantization.residual is None else self._memory(requantization.residual)
        factors = f"&{self._name('requantization' + variant(by_shifts(step)), index)}"
        return [*first, factors, self._memory(step.input), residual, self._memory(step.output)]

    def _memory(self, number: int) -> str:
        if number == 0:
            return "image"
        offset = self.arena.offsets.get(number)
        return "output" if offset is None else f"{self.prefix}_arena + {offset}"


def window_distances(window: Window, source: Activation) -> dict[str, int]:
    """A window's sizes as ``templates/windows.c`` wants them: in bytes of the activation ``[H, W, C]`` it reads."""
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
    """What the names of kernels that requantize by shifts end in."""
    return "_by_shifts" if shifts else ""


def braces(fields: Mapping[str, object]) -> str:
    """A struct's constants by name."""
    return "{" + ", ".join(f".{name} = {value}" for name, value in fields.items()) + "}"


def size(activation: Activation) -> str:
    """``HxWxC``."""
    return f"{activation.height}x{activation.width}x{activation.channels}"


def wrapped(line: str) -> str:
    """A statement broken into lines of at most 120 letters, behind commas."""
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
    """Text of others, such as a layer's path, with nothing that could end a C comment."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._- ") else "_" for letter in text)

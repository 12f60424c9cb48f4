"""A quantized network as C99: one file of code, a header of numbers, the header to include, and a test of its own.

No dependency, no heap, no floating point. Kernels are the files of ``templates/``, of which a network gets those that
it uses, with its name for ``net``; they compute what ``adder_layers/integer/reference.py`` does, to the bit.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from torch import Tensor

from ....adder_layers.integer.plan import Adder, AveragePool, Convolution, IntegerPlan, Linear, MaxPool, Rescale
from ....adder_layers.integer.reference import run
from ...errors import ExportError
from .arena import plan_arena
from .c_steps import CSteps, size, variant
from .c_tables import number_lines
from .checks import check_exportable, check_images
from .constants import by_shifts
from .pixels import Normalization

_TEMPLATES = Path(__file__).with_name("templates")
_VARYING = "factor|times|requantization|requantize|adder|convolution|rescale|average_pool"  # see ``variant``
_INT32_MAX = 2**31 - 1


def c_source(plan: IntegerPlan, name: str, images: Tensor, pixels: Normalization) -> dict[str, Iterable[str]]:
    """Write a network in C.

    Args:
        plan: The network.
        name: What it is called; C names and file names begin with ``c_identifier(name)``.
        images: Bytes ``[N, H, W, C]`` uint8, recorded in the test together with what the network makes of them.
        pixels: How images are normalized, for the header.

    Returns:
        For each file its text, in pieces that are made while they are read: ``NAME.h``, ``NAME_weights.h``, ``NAME.c``
        and ``NAME_test.c``.

    Raises:
        ExportError: The plan does not fit together, could overflow or is too large for 32-bit addresses, or images
            are of another size.
    """
    check_exportable(plan)
    check_images("images are", images, plan)
    arena, prefix = plan_arena(plan), c_identifier(name)
    largest = max([arena.size, *(a.height * a.width * a.channels for a in plan.activations)])
    if largest > _INT32_MAX:
        raise ExportError(f"the network needs {largest} bytes of memory, expected at most {_INT32_MAX}")
    steps = CSteps(plan, prefix, arena)
    return {
        f"{prefix}.h": _header(plan, steps, pixels),
        f"{prefix}_weights.h": _weights(steps),
        f"{prefix}.c": _body(plan, steps),
        f"{prefix}_test.c": _test(plan, prefix, images),
    }


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a network in C needs.

    Args:
        ram: Bytes of activations, without the caller's image and output.
        rom: Bytes of weights and factors, without the code.
    """

    ram: int
    rom: int


def memory(plan: IntegerPlan) -> Memory:
    """What a plan needs as C."""
    arena = plan_arena(plan)
    return Memory(arena.size, sum(table.bytes for table in CSteps(plan, "net", arena).tables()))


def c_identifier(name: str) -> str:
    """A name in small letters, digits and underscores that may begin C names; ``net`` where nothing is left."""
    word = re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_").lower()[:40].rstrip("_")
    return word if word[:1].isalpha() else f"net_{word}".rstrip("_")


def _header(plan: IntegerPlan, steps: CSteps, pixels: Normalization) -> Iterator[str]:
    prefix, macro = steps.prefix, steps.prefix.upper()
    image, last = plan.activations[0], plan.steps[-1]
    constants: dict[str, object] = {
        "IMAGE_HEIGHT": image.height,
        "IMAGE_WIDTH": image.width,
        "IMAGE_CHANNELS": image.channels,
        "IMAGE_BYTES": image.height * image.width * image.channels,
        "IMAGE_SCALE": image.scale,
        "IMAGE_ZERO": braced(image.zero.tolist()),
        "IMAGE_MEAN": braced(pixels.mean),
        "IMAGE_STD": braced(pixels.std),
    }
    if isinstance(last, Linear):
        written = f"{len(last.offset)} logits; a logit stands for {macro}_OUTPUT_SCALE * logit"
        constants |= {"OUTPUTS": len(last.offset), "OUTPUT_SCALE": last.scale}
    else:
        output = plan.activations[last.output]
        written = f"bytes {size(output)}, channels fastest; a byte stands for {macro}_OUTPUT_SCALE * (byte - zero)"
        constants |= {
            "OUTPUTS": output.height * output.width * output.channels,
            "OUTPUT_SCALE": output.scale,
            "OUTPUT_ZERO": braced(output.zero.tolist()),
        }
    needed = memory(plan)
    constants |= {"RAM_BYTES": needed.ram, "ROM_BYTES": needed.rom}
    yield from (
        f"/* {prefix}: a network in integers alone, written by adderkit.\n",
        " *\n",
        f" * {prefix}_run reads an image of bytes {size(image)} (height x width x channels, channels fastest)\n",
        f" * and writes {written}.\n",
        " * A pixel p of channel c, from 0 to 255, is the byte q:\n",
        f" *     x = (p / 255 - {macro}_IMAGE_MEAN[c]) / {macro}_IMAGE_STD[c]\n",
        f" *     q = clamp(floor(x / {macro}_IMAGE_SCALE + {macro}_IMAGE_ZERO[c] + 1/2), 0, 255)\n",
        " *\n",
        " * Memory: RAM_BYTES for activations, static, so that a call must have ended before the next one begins;\n",
        " * ROM_BYTES for weights and factors, without the code. The caller's image and output come on top, and on\n",
        f" * the stack an address for each tap of the largest window ({_most_taps(plan)}).\n",
        " */\n",
        f"#ifndef {macro}_H\n#define {macro}_H\n\n#include <stdint.h>\n\n",
        '#ifdef __cplusplus\nextern "C" {\n#endif\n\n',
        *(f"#define {macro}_{key} {value}\n" for key, value in constants.items()),
        f"\n{_prototype(plan, prefix)};\n\n",
        "#ifdef __cplusplus\n}\n#endif\n\n#endif\n",
    )


def braced(values: Iterable[float]) -> str:
    """The constants of an array."""
    return "{" + ", ".join(map(str, values)) + "}"


def _weights(steps: CSteps) -> Iterator[str]:
    macro = steps.prefix.upper()
    yield f"/* Weights and factors of {steps.prefix}; only {steps.prefix}.c includes this. */\n"
    yield f"#ifndef {macro}_WEIGHTS_H\n#define {macro}_WEIGHTS_H\n\n#include <stdint.h>\n"
    for table in steps.tables():
        yield "\n"
        yield from table.lines()
    yield "\n#endif\n"


def _body(plan: IntegerPlan, steps: CSteps) -> Iterator[str]:
    prefix = steps.prefix
    yield f"/* {prefix}: see {prefix}.h. C99 without heap and without floating point. */\n"
    yield f'#include "{prefix}.h"\n\n#include <stddef.h>\n\n#include "{prefix}_weights.h"\n\n'
    if _most_taps(plan):
        yield f"#define {prefix.upper()}_MOST_TAPS {_most_taps(plan)}\n\n"
    for part, shifts in _parts(plan):
        yield _template(part, prefix, shifts) + "\n"
    yield from steps.structs()
    if steps.arena.size:
        yield "\n/* Activations; those whose lives do not meet share their place. */\n"
        yield f"static uint8_t {prefix}_arena[{prefix.upper()}_RAM_BYTES];\n"
    yield f"\n{_prototype(plan, prefix)}\n{{\n"
    yield from steps.calls()
    yield "}\n"


def _parts(plan: IntegerPlan) -> Iterator[tuple[str, bool]]:
    """Names of the templates that a plan needs, in the order of definition, and whether those that requantize shift."""
    used = {(type(step), by_shifts(step)) for step in plan.steps}
    classes = {cls for cls, _ in used}
    if classes - {Rescale, Linear}:
        yield "windows", False
    if classes & {Adder, Convolution, MaxPool}:
        yield "sliding", False
    if classes & {Adder, Convolution}:
        yield "layers", False
    for shifts in (False, True):
        kinds = [cls.kind for cls in (Adder, Convolution, Rescale, AveragePool) if (cls, shifts) in used]
        if kinds:
            yield "times_shift" if shifts else "times_multiply", shifts
        for part in (["requantize"] if kinds else []) + kinds:
            yield part, shifts
    for cls in (MaxPool, Linear):
        if cls in classes:
            yield cls.kind, False


def _most_taps(plan: IntegerPlan) -> int:
    """Taps of the largest window that ``templates/sliding.c`` moves, 0 without one."""
    steps = [step for step in plan.steps if isinstance(step, Adder | Convolution | MaxPool)]
    return max((step.window.kernel[0] * step.window.kernel[1] for step in steps), default=0)


def _template(part: str, prefix: str, shifts: bool = False) -> str:
    text = (_TEMPLATES / f"{part}.c").read_text(encoding="utf-8")
    text = re.sub(rf"\bnet_({_VARYING})\b", rf"net_\1{variant(shifts)}", text)
    return re.sub(r"\bNET_", f"{prefix.upper()}_", re.sub(r"\bnet_", f"{prefix}_", text))


def _prototype(plan: IntegerPlan, prefix: str) -> str:
    output = "int32_t *logits" if plan.ends_in_logits else "uint8_t *output"
    return f"void {prefix}_run(const uint8_t *image, {output})"


def _test(plan: IntegerPlan, prefix: str, images: Tensor) -> Iterator[str]:
    macro, kind = prefix.upper(), "int32_t" if plan.ends_in_logits else "uint8_t"
    yield f"/* Runs {prefix} on recorded images and compares with what was recorded: a program of its own.\n"
    yield f" *     cc -std=c99 {prefix}.c {prefix}_test.c && ./a.out\n */\n"
    yield f'#include <stdio.h>\n\n#include "{prefix}.h"\n\n#define IMAGES {len(images)}\n\n'
    yield f"static const uint8_t images[IMAGES][{macro}_IMAGE_BYTES] = {{\n"
    yield from chain.from_iterable(_row(image) for image in images)
    yield f"}};\n\nstatic const {kind} expected[IMAGES][{macro}_OUTPUTS] = {{\n"
    yield from chain.from_iterable(_row(run(plan, image[None])) for image in images)
    yield "};\n\n"
    yield f"typedef {kind} output_type;\n\n" + _template("test_main", prefix)


def _row(values: Tensor) -> Iterator[str]:
    yield "{\n"
    yield from number_lines(values.flatten())
    yield "},\n"

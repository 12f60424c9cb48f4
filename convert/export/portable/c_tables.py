"""Tables of numbers as C99 arrays, line by line, so that millions of weights need no second copy in memory."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

_TYPES = {torch.uint8: "uint8_t", torch.int8: "int8_t", torch.int32: "int32_t", torch.int64: "int64_t"}
_BYTES_PER_LINE = 32
_NUMBERS_AT_ONCE = 1 << 16


@dataclasses.dataclass(frozen=True)
class Table:
    """A constant array.

    Args:
        name: Its C name.
        values: Of one of the integer types; a table has one dimension in C, the last one of ``values`` fastest.
        comment: What it is; no text of others.
    """

    name: str
    values: Tensor
    comment: str

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self.values.numel() * self.values.element_size()

    def lines(self) -> Iterator[str]:
        """The definition."""
        flat = self.values.flatten()
        yield f"/* {self.comment} */\n"
        yield f"static const {_TYPES[flat.dtype]} {self.name}[{len(flat)}] = {{\n"
        yield from number_lines(flat)
        yield "};\n"


def number_lines(flat: Tensor) -> Iterator[str]:
    """Numbers with commas between them, some to a line, without braces."""
    per_line = _BYTES_PER_LINE // flat.element_size()
    for part in flat.split(_NUMBERS_AT_ONCE):
        words = [str(number) for number in part.tolist()]
        for start in range(0, len(words), per_line):
            yield ",".join(words[start : start + per_line]) + ",\n"

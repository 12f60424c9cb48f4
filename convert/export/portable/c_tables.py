"""Tables of numbers as C99 arrays, written line by line: millions of weights need no second copy in memory."""

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
        name: Name in C.
        values: Numbers of an integer dtype; the array has one dimension in C, with the last one of ``values`` fastest.
        comment: Description, without any text from outside, which could end the comment.
    """

    name: str
    values: Tensor
    comment: str

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.values.numel() * self.values.element_size()

    def lines(self) -> Iterator[str]:
        """Yield the definition."""
        flat = self.values.flatten()
        yield f"/* {self.comment} */\n"
        yield f"static const {_TYPES[flat.dtype]} {self.name}[{len(flat)}] = {{\n"
        yield from number_lines(flat)
        yield "};\n"


def number_lines(flat: Tensor) -> Iterator[str]:
    """Yield lines of comma-separated numbers, without braces."""
    per_line = _BYTES_PER_LINE // flat.element_size()
    for part in flat.split(_NUMBERS_AT_ONCE):
        words = [str(number) for number in part.tolist()]
        for start in range(0, len(words), per_line):
            yield ",".join(words[start : start + per_line]) + ",\n"


def shift_codes(factors: Tensor) -> Tensor:
    """Encode powers of two ``±2^k`` int32 as ``±(k + 1)`` int8, and 0 as 0."""
    sizes = factors.long().abs()
    bits = torch.frexp(sizes.double()).exponent  # 2^k is 0.5 · 2^(k + 1), and 0 has the exponent 0
    return (bits * factors.sign()).to(torch.int8)

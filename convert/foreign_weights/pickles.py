"""Read PyTorch's pickled files: ``torch.load`` with ``weights_only``, restricted further to tensors and known records.

What a pickle calls, and with what, is checked before anything is read: ``weights_only`` also allows calls such as
``bytearray(2**31)``, which fill the memory from a file of a thousand bytes.
"""

import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickletools import genops
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch.serialization import safe_globals

from ..errors import CheckpointError
from .file_kinds import Format
from .records import RECORDS

_MAX_BYTES = 1 << 24  # of a pickle, without the tensors' data; that of a ResNet-152 with its optimizer has 1 MB
_LEGACY_PICKLES = 5  # a magic number, the protocol, the system, the object, the keys of its storages

_KEPT = ("state_dict_ema", "model_ema", "state_dict", "model")  # what the advice extracts, in timm's order

_ENCODE = "_codecs.encode"  # how bytes are pickled
_CALLED = {
    _ENCODE,
    "collections.OrderedDict",
    "collections.Counter",
    "builtins.set",
    "builtins.complex",
    "torch.Size",
    "torch.device",
    *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    *RECORDS,
}
_NAMED = re.compile(r"torch\.(\w+Storage|storage\.UntypedStorage|b?float\w+|u?int\w+|complex\w+|bool|half|double|long)")

_TEXTS = {"BINUNICODE", "SHORT_BINSTRING"}
_PUTS = {"BINPUT", "LONG_BINPUT"}
_GETS = {"BINGET", "LONG_BINGET"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_POPPED = {"BUILD": 1, "APPEND": 1, "SETITEM": 2, "BINPERSID": 1}  # values that an opcode takes off the stack
_TO_MARK = {"APPENDS", "SETITEMS"}
_PUSHED = {"BINPERSID", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LONG1"}
_PUSHED |= {"BININT", "BININT1", "BININT2", "BINFLOAT"}


class _Global(NamedTuple):
    name: str


def load_pickled(path: Path, kind: Format) -> Any:
    """Read a file of ``torch.save`` that holds nothing but tensors and known records.

    Args:
        path: The file.
        kind: Its format, as ``format_of`` says: ``"zip"`` or ``"legacy"``.

    Raises:
        CheckpointError: The file is damaged, or holds other objects.
    """
    try:
        foreign = sorted(_foreign_names(path, kind))
    except CheckpointError:
        raise
    except Exception as error:  # pickletools raises errors of many kinds
        raise _damaged(path, error) from error
    if foreign:
        raise CheckpointError(
            f"cannot read weights from {path}: it holds pickled objects, which may run code, expected tensors only; "
            f"found {', '.join(name[:60] for name in foreign[:3])}. {_extraction(path)}"
        )
    try:
        with warnings.catch_warnings(), safe_globals([(put, name) for name, put in RECORDS.items()]):
            warnings.simplefilter("ignore")  # about old formats, which are harmless or an error below
            with path.open("rb") as file:  # by its name, torch might take it for another format
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # from the unpickler too, which looks opcodes up in a dictionary
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    said = type(error).__name__ if isinstance(error, LookupError) else str(error)
    reason = said.splitlines()[0][:200] if said else type(error).__name__
    return CheckpointError(
        f"cannot read weights from {path}: it is cut off or damaged ({reason}); download or copy it again"
    )


def _extraction(path: Path) -> str:
    """Return the advice for a file of pickled objects: a command that keeps only its weights."""
    return (
        "If you trust it, extract its weights where its code is installed: "
        f"python -c \"import torch; net = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        f"net = next((net[key] for key in {_KEPT} if key in net), net) if isinstance(net, dict) else net; "
        "torch.save(net.state_dict() if hasattr(net, 'state_dict') else net, 'weights.pth')\""
    )


def _foreign_names(path: Path, kind: Format) -> set[str]:
    """Return the names of objects and functions in a file that are neither tensors nor known records."""
    foreign: set[str] = set()
    with path.open("rb") as file:
        if kind == "legacy":
            for _ in range(_LEGACY_PICKLES):
                foreign |= _foreign_in(file, path)
            return foreign
        with zipfile.ZipFile(file) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.partition("/")[2] == "data.pkl")
            if entry.file_size > _MAX_BYTES:
                raise _too_large(path)
            return _foreign_in(io.BytesIO(archive.read(entry)), path)


def _too_large(path: Path) -> CheckpointError:
    return CheckpointError(
        f"cannot read weights from {path}: it holds more than {_MAX_BYTES:,} bytes besides tensors; save only the "
        "state dict"
    )


def _foreign_in(file: BinaryIO, path: Path) -> set[str]:
    start, foreign, encoded = file.tell(), set(), 0
    for called, arguments in _globals_and_calls(file):
        if file.tell() - start > _MAX_BYTES:
            raise _too_large(path)
        if arguments is None:
            if called not in _CALLED and not _NAMED.fullmatch(called):
                foreign.add(called)
            continue
        if called not in _CALLED:
            foreign.add(called)
        if called == _ENCODE:  # other encodings of the same text again and again would grow without bound
            text, encoding = arguments if len(arguments) == 2 else (None, None)
            if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
                foreign.add(called)
            else:
                encoded += len(text)
    if encoded > file.tell() - start:
        raise CheckpointError(f"cannot read weights from {path}: its pickle repeats the same bytes too often")
    return foreign


def _globals_and_calls(file: BinaryIO) -> Iterator[tuple[str, tuple[Any, ...] | None]]:
    """Yield the name of each global that a pickle mentions, and of each call with what is known of its arguments.

    Strings, tuples and globals are followed on the stack and through the memo; any other value is ``None``.

    Raises:
        Exception: The pickle is malformed, or has an opcode that ``weights_only`` does not support.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    for opcode, value, _ in genops(file):
        name, argument = opcode.name, cast(Any, value)
        if name == "GLOBAL":
            stack.append(_Global(_modern_name(argument)))
            yield stack[-1].name, None
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            known = called.name if isinstance(called, _Global) else f"a call of a {type(called).__name__}"
            yield known, arguments if isinstance(arguments, tuple) else ()
            stack.append(None)
        elif name in _TEXTS:
            stack.append(argument)
        elif name in _PUTS:
            memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name == "TUPLE" or name in _TO_MARK:
            items, stack = stack, marks.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
        elif name in _TUPLES:
            size = _TUPLES[name]
            items = stack[len(stack) - size :]
            del stack[len(stack) - size :]
            stack.append(tuple(items))
        elif name in _POPPED or name in _PUSHED:
            del stack[len(stack) - _POPPED.get(name, 0) :]
            stack += [None] * (name in _PUSHED)
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"the pickle has the opcode {name}")


def _modern_name(argument: str) -> str:
    """Return the dotted name of a global; built-in objects by their module in Python 3."""
    module, name = argument.split(" ", 1)
    return f"{'builtins' if module == '__builtin__' else module}.{name}"

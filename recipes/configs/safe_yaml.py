"""YAML that somebody else may have written: values only, and nothing that grows when it is read or printed."""

from typing import Any

import yaml
from yaml.constructor import ConstructorError

_LONGEST_NUMBER = 64  # characters; sexagesimal numbers (1:30:00) take time that grows with the square of theirs


class _Loader(yaml.SafeLoader):
    """Refuses aliases, of which a few lines can stand for gigabytes, and numbers beyond 64 bits."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ConstructorError(None, None, f"alias *{event.anchor:.40}, expected values in full", event.start_mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        number = int(super().construct_yaml_int(node)) if len(text) <= _LONGEST_NUMBER else 1 << 64
        if number.bit_length() > 64:
            raise ConstructorError(None, None, f"number {text:.20}…, expected at most 64 bits", node.start_mark)
        return number

    def construct_yaml_float(self, node: Any) -> float:
        text = self.construct_scalar(node)
        if len(text) > _LONGEST_NUMBER:
            raise ConstructorError(None, None, f"number {text:.20}…, expected fewer digits", node.start_mark)
        return float(super().construct_yaml_float(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def load_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: The text is no YAML, or holds what is refused; the message is one line.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML's own, and what its constructors run into: impossible dates, deep nesting
        if isinstance(error, yaml.MarkedYAMLError) and error.problem:
            line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise ValueError(f"{error.problem}{line}") from error
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error

"""Check the front matter of a model card, which people edit, before anything is sent to the Hub."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results

from ...convert.errors import AdderkitError, PublishError
from ...convert.hub import check_repository
from ..configs.files import parse_yaml

_RELATIONS = ("finetune", "adapter", "merge", "quantized")


def check_card(card: Path) -> None:
    """Refuse a model card whose front matter the Hub would refuse, as far as that can be told without the Hub.

    Args:
        card: The model card, a README.md.

    Raises:
        PublishError: The front matter is not YAML, or a value has another form than the Hub expects.
    """
    try:
        text = card.read_text(encoding="utf-8-sig")
        _check_front_matter(text)
    except (OSError, ValueError, AdderkitError) as error:
        detail = " ".join(str(error).split())
        raise PublishError(
            f"the Hub would refuse {card}: {detail}; correct it, or write a new card with --force"
        ) from error


def _check_front_matter(text: str) -> None:
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        if text.lstrip().startswith("---"):
            raise PublishError("its front matter has no closing line ---")
        return
    values = parse_yaml(match[2], "its front matter") if match[2].strip() else {}
    for key, (check, expected) in _KEYS.items():
        if values.get(key) is not None and not check(values[key]):
            raise PublishError(f"{key} is {values[key]!r:.80}, expected {expected}")
    names = values.get("base_model") or []
    for name in [names] if isinstance(names, str) else names:
        check_repository(name, "base_model")
    if values.get("model-index"):
        _check_measurements(values["model-index"])


def _check_measurements(index: object) -> None:
    """Check ``model-index`` with the Hub's client.

    Raises:
        PublishError: It is not a list of models with their measurements.
    """
    try:
        if not isinstance(index, list):
            raise TypeError
        model_index_to_eval_results(index)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PublishError(
            f"model-index is {index!r:.80}, expected a list of models with name and results, each with task, dataset "
            "and metrics, which have type and value"
        ) from error


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_text_or_texts(value: object) -> bool:
    return _is_text(value) or _is_texts(value)


_Check = tuple[Callable[[Any], bool], str]
_TEXT: _Check = (_is_text, "text")
_TEXTS: _Check = (_is_texts, "a list of texts")
_EITHER: _Check = (_is_text_or_texts, "text or a list of texts")

# From the Hub's reference of model card metadata, huggingface.co/docs/hub/model-cards.
_KEYS: Mapping[str, _Check] = {
    "license": _EITHER,
    "license_name": _TEXT,
    "license_link": _TEXT,
    "library_name": _TEXT,
    "pipeline_tag": _TEXT,
    "language": _EITHER,
    "datasets": _EITHER,
    "base_model": _EITHER,
    "base_model_relation": (lambda value: value in _RELATIONS, f"one of {', '.join(_RELATIONS)}"),
    "tags": _TEXTS,
    "metrics": _TEXTS,
    "new_version": _TEXT,
    "thumbnail": _TEXT,
}

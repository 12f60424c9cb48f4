"""HTML and SVG put together from parts, safe by construction: text becomes markup through ``tag``, which escapes it."""

import html
from collections.abc import Iterable

_LONGEST = 1000  # characters of a text that somebody else may have written
_VOID = frozenset({"meta", "link", "img"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(element: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
        element: Its name.
        *children: Markup (``Html``), which is taken as it is, or any other value, whose text is escaped.
        **attributes: Values are escaped; ``class_`` means ``class``, ``aria_label`` means ``aria-label``; one that is
            ``None`` is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{element}{given}>" if element in _VOID else f"<{element}{given}>{join(children)}</{element}>")


def join(parts: Iterable[object]) -> Html:
    """Markup and text in a row, the text escaped and cut where it is endless."""
    return Html("".join(part if isinstance(part, Html) else html.escape(short(part)) for part in parts))


def short(value: object) -> str:
    """A value's text, cut where it is endless."""
    text = str(value)
    return _printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def _printable(text: str) -> str:
    """Signs that do not print, such as those that turn the direction of writing, become a replacement sign."""
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "�" for sign in text)

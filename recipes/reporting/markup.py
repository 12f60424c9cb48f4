"""HTML and SVG composed of parts; safe by construction, since ``tag`` and ``join`` escape all text."""

import html
from collections.abc import Iterable

_LONGEST = 1000  # characters that are shown of a text that somebody else may have written
_VOID = frozenset({"meta", "link", "img"})


class Html(str):
    """Text that is already markup."""

    __slots__ = ()


def tag(element: str, /, *children: object, **attributes: object) -> Html:
    """Return an element.

    Args:
        element: Name of the element.
        *children: Markup (``Html``), which is kept as it is, or any other value, whose text is escaped.
        **attributes: Attribute values, which are escaped; ``class_`` means ``class``, ``aria_label`` means
            ``aria-label``, and ``None`` is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{element}{given}>" if element in _VOID else f"<{element}{given}>{join(children)}</{element}>")


def join(parts: Iterable[object]) -> Html:
    """Concatenate markup and text; the text is escaped and shortened."""
    return Html("".join(part if isinstance(part, Html) else html.escape(short(part)) for part in parts))


def short(value: object) -> str:
    """Return the text of a value, cut to a maximum length."""
    text = str(value)
    return _printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def _printable(text: str) -> str:
    """Replace characters that do not print, such as those that change the writing direction."""
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "�" for sign in text)

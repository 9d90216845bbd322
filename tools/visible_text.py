"""Text that was read somewhere, safe to be shown."""

from __future__ import annotations

import unicodedata

# Of format characters, those that join letters are text; the others would turn lines around, or are not to be seen.
_JOINERS = "\u200c\u200d"
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def make_visible(text: str, *, keep_lines: bool = False) -> str:
    """Text whose control characters and marks of direction, which would steer a terminal, are written as escapes.

    Args:
        text: any.
        keep_lines: whether line ends and tabs stay what they are.
    """
    kept = _JOINERS + "\n\t" if keep_lines else _JOINERS
    return "".join(repr(c)[1:-1] if c not in kept and unicodedata.category(c) in _INVISIBLE else c for c in text)

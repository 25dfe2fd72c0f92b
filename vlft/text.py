"""Text out of rows, made fit for a terminal or a page. Knows nothing of what it says."""

from __future__ import annotations

_TABLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}  # Unicode's control pictures
_TABLE |= {0x7F: 0x2421}
_TABLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)  # 8-bit controls; halves of characters


def printable(text: str) -> str:
    """Text whose control characters are visible, so that a row cannot steer a terminal; newlines and tabs stay."""
    return text.translate(_TABLE)

"""Read the labels of `--labels FILE`. `vlft.scoring` scores them."""

from __future__ import annotations

from pathlib import Path

from vlft.errors import ConfigError


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Read labels from a UTF-8 text file: one on each line. Blank lines, and blanks around a label, are left out.

    Raises:
        ConfigError: the file cannot be read, has fewer than two labels, or has a label twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"--labels {path}: {error.strerror or error}. Name a text file with one label on each line."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--labels {path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    lines: dict[str, int] = {}
    # Not splitlines(): it also splits at characters that may stand inside a label, such as U+2028.
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        label = line.strip()
        if not label:
            continue
        if label in lines:
            raise ConfigError(
                f"--labels {path}: lines {lines[label]} and {number} are the same label, {label!r}. Remove one of them."
            )
        lines[label] = number
    if len(lines) < 2:
        raise ConfigError(
            f"--labels {path}: {len(lines)} label{'s' if not lines else ''}, and at least 2 are needed. Write one "
            "label on each line."
        )
    return tuple(lines)

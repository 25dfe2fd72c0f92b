"""Read a YAML file that a user wrote by hand: each key once, `no` as a word, and clear messages. Knows no flag.

Neighbours: `vlft.config.said` reads `--config`, `vlft.config.mix` reads `--data_mix`. Imports yaml in functions only.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

from vlft.errors import ConfigError


def read_text(where: str, text: str, *, empty: Any = None) -> Any:
    """Return the content of a YAML text.

    `yes`, `no`, `on` and `off` are words, as in YAML 1.2, because they are values of flags (`save_strategy: no`).

    Args:
        where: the flag and its file, for messages.
        text: the content of the file.
        empty: what a key without a value holds. `null` is always None.

    Raises:
        ConfigError: the text is not YAML, or a key is given twice.
    """
    import yaml

    try:
        loader = _loader()(text)
        loader.empty = empty
        try:
            return loader.get_single_data()
        except _Twice as error:
            raise ConfigError(f"{where}: {error}") from error
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}{_fault(text, error)}") from error


class _Twice(Exception):
    """A key is given twice. Its text names the key, the lines and both values."""


@functools.cache
def _loader() -> Any:
    """Return the class of loader. Built on first use, because yaml takes time to import."""
    import yaml

    class Loader(yaml.SafeLoader):
        empty: Any = None

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen: dict[str, tuple[Any, Any]] = {}
            for key, value in node.value:
                name = str(key.value).replace("-", "_")
                if name in seen and name != "<<":
                    first, before = seen[name]
                    values = f": {before.value} and {value.value}" if _are_words(before, value) else ""
                    lines = f"in lines {first.start_mark.line + 1} and {key.start_mark.line + 1}"
                    raise _Twice(f"{key.value} is given twice, {lines}{values}. Keep one")
                seen[name] = (key, value)
            return super().construct_mapping(node, deep=deep)

        def construct_yaml_null(self, node: Any) -> Any:
            return None if node.value else self.empty

    Loader.add_constructor("tag:yaml.org,2002:null", Loader.construct_yaml_null)
    Loader.yaml_implicit_resolvers = {
        first: [one for one in resolvers if one[0] != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def _are_words(*nodes: Any) -> bool:
    return all(isinstance(node.value, str) for node in nodes)


def _fault(text: str, error: Exception) -> str:
    """Return what is wrong with a text that is not YAML: the line, the usual mistake in it, or else yaml's words."""
    mark = getattr(error, "context_mark", None) or getattr(error, "problem_mark", None)
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return f": not valid YAML ({error})"
    number, line = mark.line + 1, lines[mark.line]
    before = next((no for no in range(number - 1, 0, -1) if _holds_more(lines[no - 1])), 0)
    if "\t" in line.partition("#")[0]:
        what = "contains a tab. Use spaces"
    elif ":" not in line.replace("://", "") or (": " not in line and not line.rstrip().endswith(":")):
        what = "is not `name: value`. Put a colon and a space after the name"
    elif line.startswith(" ") or (before and lines[before - 1].startswith(" ")):
        if not line.startswith(" "):
            number, line = before, lines[before - 1]
        what = "is not indented as the lines around it. Start each flag at the beginning of its line"
    else:
        what = f"is not valid YAML ({getattr(error, 'problem', None) or error}). Quote a value that contains a colon"
    return f", line {number}: {line.strip()!r} {what}"


def _holds_more(line: str) -> bool:
    """Return whether a line holds more than blanks and a comment."""
    return bool(line.strip()) and not line.strip().startswith("#")

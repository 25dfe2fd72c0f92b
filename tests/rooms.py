"""The rooms of vlft and the order between them. `python3 tests/rooms.py` prints sizes and imports; it needs no package.

A module belongs to the room with the longest name that it begins with: `vlft.data.rows.turns` to `data.rows`. A room
may import what lies below it; two rooms on one floor are strangers. No circle of modules is allowed, inside rooms too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: Room -> its floor. `vlft` itself holds the version and the public names, `vlft.__main__` calls cli.
FLOORS: dict[str, float] = {
    "errors": 0,
    "screen": 0,
    "files": 0.5,
    "model_files": 0.5,
    "text": 0.5,
    "interrupts": 0.5,
    "families": 1,
    "metrics": 1,
    "config": 1.5,
    "data.pixel_memory": 1.9,
    "data.shared_cache": 1.9,
    "data.sample": 2.0,
    "data.workers": 2.0,
    "data.ipc": 2.0,
    "data.media": 2.1,
    "data.rows": 2.2,
    "data.features": 2.2,
    "data.files": 2.3,
    "data": 2.4,  # the way of a sample: encode, positions, collate, dataset
    "data.costs": 2.5,
    "data.order": 2.6,
    "model": 2,
    "checkpoint": 3,
    "objectives": 3,
    "pages": 3,
    "setup": 4,
    "answering": 4,
    "scoring": 4.1,
    "train": 5,
    "merge": 5,
    "evaluation": 5,
    "check": 5,
    "preview": 5,
    "plan": 5,
    "chat": 5,
    "convert": 5,
    "report": 5,
    "ui": 5,
    "api": 5.5,  # the public functions, for loops of one's own
    "demo": 6,
    "bench": 6,
    "cli": 7,
    "__main__": 8,
}
#: Every room above may import these.
FOR_ALL = ("", "errors", "files", "model_files", "text", "interrupts", "screen", "families")


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import of a module of vlft, at the top of a file or inside a function."""

    importer: str
    line: int
    imported: str


def modules() -> dict[str, Path]:
    """`vlft.data.order` -> its file, for every module."""
    return {name_of(file): file for file in sorted((ROOT / "vlft").rglob("*.py"))}


def name_of(file: Path) -> str:
    """`vlft/data/order.py` -> `vlft.data.order`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room of a module; "" for `vlft` itself, None for a module that has none."""
    name = module.partition(".")[2]
    if not name:
        return ""
    fitting = (room for room in FLOORS if name == room or name.startswith(room + "."))
    return max(fitting, key=len, default=None)


def imports_in(source: str, module: str, known: set[str], *, is_package: bool = False) -> Iterator[Import]:
    """Every import of vlft in a source.

    Args:
        module: name of what is read. known: names of all modules, to tell `from vlft.model import loss` from a name.
        is_package: the source is an `__init__.py`, so that `from .` means the package itself.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                parts = module.split(".")
                base = parts[: len(parts) - node.level + is_package]
                package = ".".join([*base, *([node.module] if node.module else [])])
            inside = [f"{package}.{name.name}" for name in node.names]
            names = [name if name in known else package for name in inside]
        else:
            continue
        for name in dict.fromkeys(names):
            if name.split(".")[0] == "vlft":
                yield Import(importer=module, line=node.lineno, imported=name)


def fault_of(found: Import) -> str | None:
    """What is wrong with an import, or None."""
    ours, theirs = room_of(found.importer), room_of(found.imported)
    at = f"{found.importer}:{found.line} imports {found.imported}"
    if ours is None or theirs is None:
        return f"{at}: one of them has no room in tests/rooms.py"
    if ours == "":
        return None  # the public names, which are imported where they are asked for
    if theirs == ours or (theirs in FOR_ALL and FLOORS.get(theirs, 0) < FLOORS[ours]):
        return None
    if theirs == "" and ours:
        return None  # the version
    if FLOORS[theirs] >= FLOORS[ours] or (theirs.split(".")[0] != ours.split(".")[0] and _strangers(ours, theirs)):
        return f"{at} ({ours} is on floor {FLOORS[ours]:g}, {theirs} on {FLOORS[theirs]:g})"
    return None


def _strangers(one: str, other: str) -> bool:
    """Rooms of data and model never see each other, whatever their floors."""
    return {one.split(".")[0], other.split(".")[0]} == {"data", "model"}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle (strongly connected components of more than one)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    waiting: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        waiting.append(module)
        for other in arrows.get(module, ()):
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in waiting:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            group = waiting[waiting.index(module) :]
            del waiting[waiting.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in arrows:
        if module not in order:
            visit(module)
    return found


def arrows() -> dict[str, set[str]]:
    """Module -> modules of vlft that it imports. `vlft` itself has none: its names are imported when asked for."""
    files = modules()
    known = set(files)
    return {
        name: {
            found.imported
            for found in imports_in(file.read_text(), name, known, is_package=file.name == "__init__.py")
            if found.imported in known and found.imported != name and name != "vlft"
        }
        for name, file in files.items()
    }


@dataclass(frozen=True, kw_only=True)
class Size:
    """A room in numbers: files, their lines, the longest file and the longest function (name, lines)."""

    files: int
    lines: int
    longest_file: tuple[str, int]
    longest_function: tuple[str, int]


def sizes() -> dict[str, Size]:
    """Room -> its size."""
    rooms: dict[str, list[tuple[str, Path]]] = {}
    for name, file in modules().items():
        rooms.setdefault(room_of(name) or "vlft", []).append((name, file))
    result = {}
    for room, members in sorted(rooms.items()):
        lengths = {name: len(file.read_text().splitlines()) for name, file in members}
        functions = [("-", 0), *(one for name, file in members for one in _functions(name, file.read_text()))]
        result[room] = Size(
            files=len(members),
            lines=sum(lengths.values()),
            longest_file=max(lengths.items(), key=lambda one: one[1]),
            longest_function=max(functions, key=lambda one: one[1]),
        )
    return result


def _functions(module: str, source: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{module}.{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def main() -> None:
    """Print both tables."""
    found = sizes()
    print(f"{'room':<14} {'files':>5} {'lines':>7}  longest file, longest function")
    for room, size in found.items():
        longest = (
            f"{size.longest_file[0]} {size.longest_file[1]}, {size.longest_function[0]} {size.longest_function[1]}"
        )
        print(f"{room:<14} {size.files:>5} {size.lines:>7}  {longest}")
    print(f"{'all':<14} {sum(s.files for s in found.values()):>5} {sum(s.lines for s in found.values()):>7}\n")
    between: dict[str, set[str]] = {}
    every = arrows()
    for module, others in every.items():
        ours = room_of(module)
        between.setdefault(ours or "vlft", set()).update(
            theirs or "vlft" for theirs in map(room_of, others) if theirs is not None and theirs != ours
        )
    for room in sorted(between, key=lambda name: (FLOORS.get(name, -1), name)):
        print(f"{FLOORS.get(room, 0):>4g} {room:<14} <- {' '.join(sorted(between[room])) or '-'}")
    print("\ncircles:", circles(every) or "none")


if __name__ == "__main__":
    main()

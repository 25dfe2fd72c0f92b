"""Match the parameters of a model with the tensors of its files: names, layouts of experts, tensors not loaded.

It compares names and shapes and needs no torch. `vlft.checkpoint` copies tensors by the result, and `vlft.model.load`
refuses a model whose files do not match. transformers' own rules: `conversion_mapping` (qwen3_vl_moe, qwen2_moe).

Letters: E experts, O outputs and I inputs of a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vlft.families.family import ExpertLayout, Family

ShapeOf = Mapping[str, tuple[int, ...]]

_EXPERTS = re.compile(r"(?P<experts>.+\.experts)\.(?P<matrix>gate_up_proj|down_proj)")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\.(?P<matrix>gate|up|down)_proj\.weight")
#: Matrix of a fused tensor -> the matrices that a file may hold instead, in the order of their rows.
_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The tensors of a file that hold one parameter.

    Attributes:
        names: as the file spells them; with the layout `each`: gate and up, or down, of the first expert, and so on.
        layout: `fused` for every parameter that is stored as it is.
        matrices: with the layout `each`, number of tensors per expert.
    """

    names: tuple[str, ...]
    layout: ExpertLayout = "fused"
    matrices: int = 1


@dataclass(frozen=True, kw_only=True)
class Match:
    """Parameters of a model, and the tensors that hold them.

    Attributes:
        sources: parameter -> its tensors, for every parameter that matches.
        missing: published names of parameters without tensors.
        unexpected: published names of tensors that hold no parameter.
        mismatched: published names of tensors of another shape -> (shape in the files, shape in the model).
        square: published names of experts whose layout transformers misreads, since their shape does not show it.
    """

    sources: dict[str, Source]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    square: tuple[str, ...]


def is_carried(family: Family, name: str) -> bool:
    """Whether a tensor of a file is copied but never loaded."""
    return name.startswith(family.carried)


def parameter_of(family: Family, stored: str) -> str:
    """The parameter, by its published name, that a tensor of a file holds or is a part of."""
    name = family.published_name(stored)
    found = _EXPERT.fullmatch(name) if "each" in family.stored_experts else None
    if found is None:
        return name
    return f"{found['experts']}.{'down' if found['matrix'] == 'down' else 'gate_up'}_proj"


def match(family: Family, live: ShapeOf, stored: ShapeOf) -> Match:
    """Match parameters with tensors.

    Args:
        family: of the model.
        live: parameter in transformers -> shape.
        stored: tensor as the files spell it -> shape. Tensors that are only carried are ignored.
    """
    files = {family.published_name(name): name for name in stored if not is_carried(family, name)}
    shapes = {name: tuple(stored[spelt]) for name, spelt in files.items()}
    sources: dict[str, Source] = {}
    missing: list[str] = []
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    used: set[str] = set()
    for parameter, shape in live.items():
        name = family.published_name(parameter)
        expected, matrices = {name: tuple(shape)}, 1
        layout: ExpertLayout = "fused"
        experts = _EXPERTS.fullmatch(name) if family.stored_experts else None
        if experts is not None and name in shapes and shapes[name] != tuple(shape):
            if "transposed" in family.stored_experts and shapes[name] == (shape[0], shape[2], shape[1]):
                expected, layout = {name: shapes[name]}, "transposed"
        elif experts is not None and name not in shapes and "each" in family.stored_experts:
            each = dict(_each(experts["experts"], experts["matrix"], tuple(shape)))
            if each.keys() & shapes.keys():
                expected, layout, matrices = each, "each", len(_MATRICES[experts["matrix"]])
        used |= expected.keys()
        lost = [one for one in expected if one not in shapes]
        other = {one: (shapes[one], size) for one, size in expected.items() if one in shapes and shapes[one] != size}
        missing += lost
        mismatched |= other
        if not lost and not other:
            names = tuple(files[one] for one in expected)
            sources[parameter] = Source(names=names, layout=layout, matrices=matrices)
    return Match(
        sources=sources,
        missing=tuple(sorted(missing)),
        unexpected=tuple(sorted(shapes.keys() - used)),
        mismatched=dict(sorted(mismatched.items())),
        square=_square(family, live, sources),
    )


def _each(experts: str, matrix: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of the tensors that hold the experts of one layer one by one."""
    count, rows, columns = shape
    parts = _MATRICES[matrix]
    for expert in range(count):
        for part in parts:
            yield f"{experts}.{expert}.{part}.weight", (rows // len(parts), columns)


def _square(family: Family, live: ShapeOf, sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Square experts beside transposed ones. transformers transposes by shape, and so leaves them (5.17 and 5.23)."""
    if not any(source.layout == "transposed" for source in sources.values()):
        return ()
    experts = (name for name in sources if _EXPERTS.fullmatch(family.published_name(name)))
    return tuple(sorted(family.published_name(name) for name in experts if live[name][1] == live[name][2]))

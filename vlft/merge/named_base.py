"""Compare the base that a user names for merging with the quantised base that an adapter was trained on.

A base whose files are quantised cannot be merged into: what other programs load as plain weights needs 16 bits. So the
user names the unquantised model, and the two are compared here before anything is written.
"""

from __future__ import annotations

from pathlib import Path

from vlft.checkpoint import some_of
from vlft.errors import CheckpointError
from vlft.families import Family, is_tied
from vlft.families.stored import is_carried
from vlft.model.quantise import Quantisation
from vlft.model.quantised_files import QuantisedFiles
from vlft.model_files import read_json, slots_in, tensor_index

ROWS = 64  # first rows of a matrix; the embedding of a large model would take seconds
CLOSE = 2.0**-7  # of the largest value of a tensor: bfloat16 has 8 bits, and float16 more
ALIKE = 0.9  # share of a requantised tensor; GPUs and CPUs may round single values to different codes


def compare_bases(run: str | Path, quantised: QuantisedFiles, named_id: str, named: Path, family: Family) -> str:
    """Check that a base is the unquantised form of a quantised one. Returns what was compared, as a sentence.

    Args:
        run: the folder that the user named, for messages.
        quantised: the base of training.
        named_id: `--base_model`.
        named: its folder.
        family: of both.

    Raises:
        CheckpointError: names a tensor that is missing, has another shape or other values.
    """
    from vlft.model.packed import dequantised  # imports torch

    index = tensor_index(named)
    files = {family.published_name(name): name for name in index if not is_carried(family, name)}
    shapes = {name: slot.shape for file in set(index.values()) for name, slot in slots_in(file).items()}
    head = family.published_name(family.head)
    tied = is_tied(read_json(named / "config.json"))
    there = {name: slot.shape for name, (_, slot) in quantised.others.items() if not is_carried(family, name)}
    there |= {name: quantised.shape(name) for name in quantised.states}
    here = {name: tuple(shapes[stored]) for name, stored in files.items()}
    if tied:
        there.pop(head, None)
        here.pop(head, None)
    what = f"{run}: trained on {quantised.folder}, whose files are quantised; {named_id} is not its unquantised form"
    if odd := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        name = odd[0]
        raise CheckpointError(
            f"{what}: {len(odd)} tensors are missing in one of them or have another shape, e.g. {name} "
            f"{_shape(there.get(name))} there, {_shape(here.get(name))} here. Pass the right one as --base_model."
        )
    largest = 0.0
    for name, (stored, _) in sorted(quantised.others.items()):
        if name not in there:
            continue
        wanted = quantised.tensor(stored)[:ROWS].float()
        found = _rows(index, files[name]).float()
        difference = (wanted - found).abs().max().item() / max(wanted.abs().max().item(), 1e-30)
        if difference > CLOSE:
            raise CheckpointError(
                f"{what}: {name}, which is not quantised, differs by up to {difference:.2g} of its largest value, and "
                f"{CLOSE:.2g} is allowed. Pass the right one as --base_model."
            )
        largest = max(largest, difference)
    for name in (min(quantised.states), max(quantised.states)):
        kind = quantised.states[name].rpartition("__")[2]
        wanted = quantised.weight(name)
        found = dequantised(_whole(index, files[name]), Quantisation(kind=kind))  # type: ignore[arg-type]
        alike = ((wanted - found).abs() <= CLOSE * wanted.abs().max()).float().mean().item()
        if alike < ALIKE:
            raise CheckpointError(
                f"{what}: quantised again, {alike:.0%} of {name} are the values of training, and {ALIKE:.0%} are "
                "needed. Pass the right one as --base_model."
            )
    count = sum(name in there for name in quantised.others)
    return (
        f"{named_id} has the shapes of {quantised.folder}, its {count} unquantised tensors differ by at most "
        f"{largest:.2g} of their largest value (first {ROWS} rows), and {some_of((min(quantised.states),))} quantises "
        "to the values of training"
    )


def likely_name(base_id: str, family: Family) -> str:
    """The unquantised model from which a quantised one was probably made, for messages."""
    from vlft.checkpoint.door import unquantised_name

    name = unquantised_name(base_id)
    return f"probably {name}" if name is not None else f"the {family.label} from which it was made"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _rows(index: dict[str, Path], name: str):
    from safetensors import safe_open

    with safe_open(index[name], framework="pt") as file:
        return file.get_slice(name)[:ROWS]


def _whole(index: dict[str, Path], name: str):
    from safetensors import safe_open

    with safe_open(index[name], framework="pt") as file:
        return file.get_tensor(name)

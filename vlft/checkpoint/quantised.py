"""How the base of a run was quantised in training, by its record, and whether this machine can repeat it.

Neighbours: `vlft.model.quantise` does it, `vlft.checkpoint.record` keeps it. Imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

from vlft.checkpoint.files import family_of
from vlft.checkpoint.record import RECORD, RunRecord
from vlft.config.deepspeed import names_zero3
from vlft.config.quantised import cannot_share
from vlft.errors import CheckpointError, ConfigError
from vlft.model.quantise import Quantisation, library
from vlft.model.quantised_files import QuantisedFiles, is_stored_quantised

KINDS = get_args(get_type_hints(Quantisation)["kind"])


def quantisation_of(where: str | Path, record: RunRecord | None) -> Quantisation | None:
    """The number format of the base that a run trained on; None if it was not quantised, or nothing records it.

    Args:
        where: the folder that the user named, for messages.
        record: of the run.

    Raises:
        CheckpointError: the record names a format that this version does not know.
    """
    if record is None or record.quantised is None:
        return None
    settings = record.quantised
    kind: Any = settings.get("kind")
    double = settings.get("double", False)
    if kind not in KINDS or not isinstance(double, bool) or (double and kind == "int8"):
        raise CheckpointError(
            f"{where}: its {RECORD} says that the base was quantised as {settings!r}; vlft knows {', '.join(KINDS)}, "
            "and double for those of 4 bits. Update vlft, or restore the file from a checkpoint-N."
        )
    return Quantisation(kind=kind, double=double)


def computing_dtype_of(where: str | Path, record: RunRecord | None) -> str:
    """The dtype in which the quantised layers of a run computed; float32, which rounds nothing, if nothing records it.

    Args:
        where: the folder that the user named, for messages.
        record: of the run.

    Raises:
        CheckpointError: the record names a dtype in which vlft does not compute.
    """
    settings = (record.quantised if record else None) or {}
    dtype = settings.get("dtype", "float32")
    if dtype not in ("float32", "bfloat16"):
        raise CheckpointError(
            f"{where}: its {RECORD} says that the quantised layers computed in {dtype!r}; vlft computes in float32 or "
            "bfloat16. Update vlft, or restore the file from a checkpoint-N."
        )
    return str(dtype)


def described(quantisation: Quantisation) -> str:
    """A format in words, e.g. `nf4 with quantised scales`."""
    return f"{quantisation.kind}{' with quantised scales' if quantisation.double else ''}"


def settings_of(quantisation: Quantisation) -> dict[str, Any]:
    """The flags that make a format, as `Quantisation.of` takes them."""
    if quantisation.bits == 8:
        return {"bits": "8"}
    return {"bits": "4", "quant_type": quantisation.kind, "double_quant": quantisation.double}


def require_bitsandbytes(where: str | Path, quantisation: Quantisation, *, otherwise: str = "") -> None:
    """Refuse to repeat a quantisation where its package is not installed, or cannot be imported.

    Args:
        where: the folder that the user named.
        quantisation: of its base.
        otherwise: a sentence on what needs no package.

    Raises:
        CheckpointError: says how to install it.
    """
    try:
        library()
    except ConfigError as error:
        raise CheckpointError(
            f"{where}: its base is quantised ({described(quantisation)}); {error}.{otherwise and ' '}{otherwise}"
        ) from error


def check_sharing(name: str, quantisation: Quantisation | None, deepspeed: str | None) -> None:
    """Refuse ZeRO-3 for a quantised base.

    Args:
        name: of the base, for messages.
        quantisation: its number format; None: it is not quantised.
        deepspeed: `--deepspeed`, a preset or a file.

    Raises:
        ConfigError: the two cannot be combined.
    """
    if quantisation is not None and names_zero3(deepspeed):
        raise ConfigError(cannot_share(f"the quantised base {name} ({quantisation.label})", str(deepspeed)))


def check_quantised_run(name: str, quantisation: Quantisation | None, deepspeed: str | None) -> None:
    """`check_sharing`, and check that this machine can compute with the quantised base, by `require_bitsandbytes`."""
    check_sharing(name, quantisation, deepspeed)
    if quantisation is not None:
        require_bitsandbytes(name, quantisation)


def quantisation_to_answer(where: str | Path, record: RunRecord | None, folder: Path) -> Quantisation | None:
    """The format in which a model has to be loaded so that it answers as trained; None: it is not quantised.

    Args:
        where: the folder or hub id that the user named.
        record: of the run.
        folder: of the model, or of the base of the adapter.

    Raises:
        CheckpointError: the format is unknown, or bitsandbytes is not installed.
    """
    quantisation = quantisation_of(where, record)
    if quantisation is None and is_stored_quantised(folder):
        quantisation = QuantisedFiles.of(folder, family_of(folder)).quantisation
    if quantisation is not None:
        if record is not None and record.kind == "adapter":
            instead = f"A merged model needs none: vlft merge {where} OUT on a machine that has it, then use OUT."
        else:
            instead = "A model in 16 bits needs none."
        require_bitsandbytes(where, quantisation, otherwise=instead)
    return quantisation

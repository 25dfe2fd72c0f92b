"""The number format of a run's base: of the flags, of the adapter that it starts from, or of the base's files.

Neighbours: `vlft.setup.base` asks for it when it opens a base, `vlft.model.packed` quantises.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlft.checkpoint import family_of, module_name
from vlft.checkpoint.start import Start
from vlft.config.flags import ModelFlags
from vlft.errors import ConfigError
from vlft.model.chosen import mode_of
from vlft.model.quantise import Quantisation
from vlft.model.quantised_files import QuantisedFiles, is_stored_quantised
from vlft.model.towers import Towers

FLAGS = ("bits", "quant_type", "double_quant")


def format_of(
    model: ModelFlags, folder: Path, given: frozenset[str], start: Start | None, towers: Towers
) -> Quantisation | None:
    """The number format of a base; None if it is not quantised.

    Args:
        model: flags of the model.
        folder: of the base.
        given: names of the flags that the user set. Of a base whose files are quantised, the files decide all others.
        start: the adapter that the run starts from.
        towers: what trains.

    Raises:
        ConfigError: the files are quantised in another format than the user asked for, or weights that they hold
            packed would train.
    """
    flags: dict[str, Any] = {name: getattr(model, name) for name in FLAGS}
    if start is not None:
        flags |= {name: value for name, value in start.settings.items() if name in flags}
    if not is_stored_quantised(folder):
        return Quantisation.of(bits=flags["bits"], quant_type=flags["quant_type"], double=flags["double_quant"])
    files = QuantisedFiles.of(folder, family_of(folder))
    _refuse_to_train_packed(str(model.model_id), files, towers)
    stored = files.quantisation
    theirs = {"bits": str(stored.bits), "quant_type": stored.kind, "double_quant": stored.double}
    if other := [name for name in theirs if name in given and getattr(model, name) != theirs[name]]:
        asked = ", ".join(f"--{name} {str(getattr(model, name)).lower()}" for name in other)
        raise ConfigError(
            f"{asked}: the files of {model.model_id} are quantised already, to {stored.label}, which cannot be "
            "changed. Drop --bits, --quant_type and --double_quant."
        )
    return stored


def _refuse_to_train_packed(name: str, files: QuantisedFiles, towers: Towers) -> None:
    """Refuse to train packed weights in full. Raises ConfigError."""
    for tower, mode in towers.modes.items():
        if mode != "full":
            continue
        modules = [module_name(files.family, published) for published in sorted(files.states)]
        packed = [one for one in modules if files.family.tower_of(one) == tower]
        if trained := [one for one in packed if mode_of(one, files.family, towers) == "full"]:
            raise ConfigError(
                f"--{tower} full: {len(trained)} weights of the {tower} tower of {name} are stored quantised "
                f"({files.quantisation.label}), e.g. {trained[0]}, and such weights cannot be trained. Use "
                f"--{tower} lora, or a base that is not quantised."
            )


def effective_flags(flags: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The flags for config.yaml: without those of a number format, if the base's files decide it.

    Args:
        flags: all flags of a run, with the defaults of those that were not set.
        folder: of the base.
    """
    stored = is_stored_quantised(folder)
    return {name: value for name, value in flags.items() if not (stored and name in FLAGS)}

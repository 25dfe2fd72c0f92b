"""The base of a quantised run, as training used it: which of its tensors were quantised, and the values they had.

`write` and `verify` ask it for weights. `vlft.model.quantise` has the arithmetic, which gives the same bits each time,
so that one shard is in memory at a time. If the files of the base were quantised already, the values come from them,
and `named_base` compares the unquantised base that the user names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlft.checkpoint import (
    RECORD,
    Adapter,
    Located,
    attach_adapter,
    check_lineage,
    computing_dtype_of,
    family_of,
    find_base,
    module_name,
    quantisation_of,
    require_bitsandbytes,
    tensor_index,
)
from vlft.errors import CheckpointError, ConfigError
from vlft.families import Family
from vlft.families.stored import is_carried
from vlft.merge.named_base import compare_bases, likely_name
from vlft.model.quantise import Quantisation
from vlft.model.quantised_files import QuantisedFiles, is_stored_quantised

if TYPE_CHECKING:
    import torch

Onto = Literal["dequantised", "original"]


@dataclass(frozen=True, kw_only=True)
class QuantisedBase:
    """A base whose language model was quantised in training.

    Attributes:
        folder: of the base that was trained on.
        family: of the base.
        quantisation: how it was quantised.
        names: published names of the tensors that were quantised.
        files: the tensors of `folder`, if they are stored quantised; None: training quantised them.
        dtype: in which training computed, such as `bfloat16`: dense weights were rounded to it.
    """

    folder: Path
    family: Family
    quantisation: Quantisation
    names: frozenset[str]
    files: QuantisedFiles | None = None
    dtype: str = "float32"

    @property
    def _computed(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def weight(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The values with which training computed, in float32; `stored` itself if it was not quantised.

        Args:
            name: of a tensor, as the files or the modules spell it.
            stored: its value in the base.
        """
        published = self.family.published_name(name)
        if published not in self.names:
            return stored
        if self.files is not None:
            return self.files.weight(published).to(self._computed).float()
        from vlft.model.packed import dequantised

        return dequantised(stored, self.quantisation, self._computed).float()

    def dequantise(self, model: torch.nn.Module) -> None:
        """Give the linear layers of a loaded float32 base the values with which training computed."""
        for name, parameter in model.named_parameters():
            parameter.data = self.weight(name, parameter.data)

    def adapted(self, adapter: Adapter, *, untied: bool) -> torch.nn.Module:
        """What was trained: the base with quantised layers and its adapter, computing in float32 on the CPU.

        Args:
            adapter: as read for this base.
            untied: of `attach_adapter`.
        """
        import torch

        from vlft.model import lora
        from vlft.model.packed import computing_in, load_quantised

        model = load_quantised(self.folder, self.family, self.quantisation, torch.float32)
        adapted: torch.nn.Module = attach_adapter(model, adapter, self.family, untied=untied)
        lora.bind(adapted)  # PEFT (0.21) takes DoRA's lengths from weights that are rounded in another way
        return computing_in(adapted, self._computed)  # last: PEFT (0.21) replaces weights of 8 bits under DoRA


@dataclass(frozen=True, kw_only=True)
class Bases:
    """The base that a merge writes, and the one that training used.

    Attributes:
        name: of the base to write, as the user or the run named it.
        folder: its folder.
        family: of both.
        training: name and folder of the base of training.
        files: of the base of training, if they are stored quantised.
        lost: name of the base that the run names, if it cannot be opened; then it is unknown whether its files were
            quantised.
    """

    name: str
    folder: Path
    family: Family
    training: tuple[str, Path]
    files: QuantisedFiles | None = None
    lost: str | None = None

    @property
    def packed(self) -> bool:
        """Whether the base to write is the one of training, with quantised files."""
        return self.files is not None and self.name == self.training[0]

    def prove(self, run: str | Path, found: Located) -> str:
        """How it is known that the adapter belongs to these bases. Raises CheckpointError if it does not."""
        try:
            lineage = check_lineage(run, found, *self.training)
        except CheckpointError as error:
            if self.lost is None:
                raise
            raise CheckpointError(
                f"{error} If the files of {self.lost} were quantised: they cannot be opened under that name, and "
                f"{self.name} cannot be compared with them. Pass the folder where they are now as --base_model; they "
                "are then dequantised."
            ) from error
        if self.files is None:
            return lineage
        if self.packed:
            return f"{lineage}; its quantised tensors are dequantised"
        return f"{lineage}; {compare_bases(run, self.files, self.name, self.folder, self.family)}"


def find_bases(run: str | Path, found: Located, base_model: str | None) -> Bases:
    """Find the base to merge into, and the base of training where that is another one.

    Args:
        run: the folder that the user named.
        found: the adapter in it.
        base_model: `--base_model`.

    Raises:
        CheckpointError: a base cannot be opened.
    """
    name, folder = find_base(run, found, base_model)
    family = family_of(folder)
    bases = Bases(name=name, folder=folder, family=family, training=(name, folder))
    if is_stored_quantised(folder):
        return replace(bases, files=QuantisedFiles.of(folder, family))
    if base_model is None or (found.record is not None and found.record.quantised is None):
        return bases
    training = _stored_quantised(run, found)
    if training is None:
        return bases
    if isinstance(training, str):
        return replace(bases, lost=training)
    files = QuantisedFiles.of(training[1], family)
    return Bases(name=name, folder=folder, family=family, training=training, files=files)


def _stored_quantised(run: str | Path, found: Located) -> tuple[str, Path] | str | None:
    """Name and folder of the base that an adapter names, if its files are quantised; its name alone if it is gone."""
    if found.record is None and not Path(found.base_model or "").expanduser().is_dir():
        return None  # it is not fetched to find out
    try:
        name, folder = find_base(run, found, None)
    except CheckpointError:
        return found.base_model  # the fingerprint decides whether the named base is the same, moved
    return (name, folder) if is_stored_quantised(folder) else None


def quantised_base(run: str | Path, found: Located, bases: Bases, onto: Onto | None) -> QuantisedBase | None:
    """The base of a run as it was quantised; None if it was not.

    Args:
        run: the folder that the user named.
        found: the adapter in it.
        bases: of `find_bases`.
        onto: `--onto`.

    Raises:
        ConfigError: `onto` is set, but the base was not quantised; or it asks for values that no named base holds.
        CheckpointError: the record's format is unknown, another number of layers was quantised, or bitsandbytes is not
            installed.
    """
    files = bases.files
    quantisation = quantisation_of(run, found.record)
    if files is not None and quantisation is None:
        quantisation = Quantisation(kind="nf4" if "nf4" in files.kinds else "fp4")
    if quantisation is None:
        if onto is not None:
            raise ConfigError(
                f"--onto {onto} has no effect: {run} was trained on a base that was not quantised"
                f"{'' if found.record else f', as far as is known without {RECORD}'}. Drop it."
            )
        return None
    if onto == "original" and bases.packed:
        raise ConfigError(
            f"--onto original: the files of {bases.name} are quantised, and hold no other values. Name the unquantised "
            f"model, {likely_name(bases.name, bases.family)}, as --base_model, or drop --onto."
        )
    require_bitsandbytes(run, quantisation)
    names = _language_linears(tensor_index(bases.folder), bases.family) if files is None else files.states
    counted = sum(bases.family.tower_of(module_name(bases.family, name)) == "language" for name in names)
    recorded = None if found.record is None else (found.record.quantised or {}).get("modules", {}).get("language")
    if recorded != counted and not (files is not None and recorded is None):
        raise CheckpointError(
            f"{run}: its {RECORD} says that {recorded} linear layers of the language model were quantised; in "
            f"{bases.training[0]} they are {counted}. Is this the base it was trained on? Pass the right one as "
            "--base_model."
        )
    return QuantisedBase(
        folder=bases.training[1],
        family=bases.family,
        quantisation=quantisation,
        names=frozenset(names),
        files=files,
        dtype=computing_dtype_of(run, found.record),
    )


def _language_linears(names: Iterable[str], family: Family) -> list[str]:
    """Published names of the weights that `vlft.model.quantise` replaces, among the tensors of files."""
    target = re.compile(rf"(?:{family.lora_targets['language']})\.weight")
    return [
        family.published_name(name)
        for name in names
        if not is_carried(family, name) and target.fullmatch(module_name(family, name))
    ]

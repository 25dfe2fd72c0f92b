"""The base of a quantised run, as training used it: which of its tensors were quantised, and the values they had.

`write` and `verify` ask it for weights. `vlft.model.quantise` has the arithmetic, which gives the same bits each time,
so that one shard is in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlft.checkpoint import RECORD, Located, module_name, require_bitsandbytes, tensor_index
from vlft.checkpoint.quantised import quantisation_of
from vlft.errors import CheckpointError, ConfigError
from vlft.families import Family
from vlft.families.stored import is_carried
from vlft.model.quantise import Quantisation, dequantised, load_quantised

if TYPE_CHECKING:
    import torch

Onto = Literal["dequantised", "original"]


@dataclass(frozen=True, kw_only=True)
class QuantisedBase:
    """A base whose language model was quantised in training.

    Attributes:
        folder: of the base, in 16 or 32 bits.
        family: of the base.
        quantisation: how it was quantised.
        names: published names of the tensors that were quantised.
    """

    folder: Path
    family: Family
    quantisation: Quantisation
    names: frozenset[str]

    def weight(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The values with which training computed, in float32; `stored` itself if it was not quantised.

        Args:
            name: of a tensor, as the files or the modules spell it.
            stored: its value in the base.
        """
        if self.family.published_name(name) not in self.names:
            return stored
        return dequantised(stored, self.quantisation)

    def dequantise(self, model: torch.nn.Module) -> None:
        """Give the linear layers of a loaded float32 base the values with which training computed."""
        for name, parameter in model.named_parameters():
            parameter.data = self.weight(name, parameter.data)

    @property
    def rounds_inputs(self) -> bool:
        """Whether its layers also round their inputs when they answer, so that no other weights answer exactly alike."""
        return self.quantisation.kind == "int8"

    def layers(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """The layers of bitsandbytes in a model that `load` made, or in one wrapped around it."""
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        return [module for module in model.modules() if isinstance(module, Linear4bit | Linear8bitLt)]

    def load(self) -> Any:
        """The base with the layers of bitsandbytes, computing in float32 on the CPU, in evaluation mode."""
        import torch

        return load_quantised(self.folder, self.family, self.quantisation, torch.float32).eval()


def quantised_base(run: str | Path, found: Located, base: Path, family: Family, onto: Onto | None) -> Any:
    """The base of a run as it was quantised; None if it was not.

    Args:
        run: the folder that the user named.
        found: the adapter in it.
        base: folder of its base.
        family: of the base.
        onto: `--onto`.

    Raises:
        ConfigError: `onto` is set, but the base was not quantised.
        CheckpointError: the record's format is unknown, another number of layers was quantised, or bitsandbytes is not
            installed.
    """
    quantisation = quantisation_of(run, found.record)
    if quantisation is None or found.record is None:
        if onto is not None:
            raise ConfigError(
                f"--onto {onto} has no effect: {run} was trained on a base that was not quantised"
                f"{'' if found.record else f', as far as is known without {RECORD}'}. Drop it."
            )
        return None
    require_bitsandbytes(run, quantisation)
    names = frozenset(_language_linears(tensor_index(base), family))
    recorded = (found.record.quantised or {}).get("modules", {}).get("language")
    if recorded != len(names):
        raise CheckpointError(
            f"{run}: its {RECORD} says that {recorded} linear layers of the language model were quantised; {base} has "
            f"{len(names)}. Is this the base it was trained on? Pass the right one as --base_model."
        )
    return QuantisedBase(folder=base, family=family, quantisation=quantisation, names=names)


def _language_linears(names: Iterable[str], family: Family) -> list[str]:
    """Published names of the weights that `vlft.model.quantise` replaces, among the tensors of files."""
    target = re.compile(rf"(?:{family.lora_targets['language']})\.weight")
    return [
        family.published_name(name)
        for name in names
        if not is_carried(family, name) and target.fullmatch(module_name(family, name))
    ]

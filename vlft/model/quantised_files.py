"""Model folders whose weights are stored quantised by bitsandbytes in 4 bits: their tensors, dequantised one by one.

Next to the packed values of `X.weight`, the files hold its scales as `X.weight.absmax` and others, and its format as
`X.weight.quant_state.bitsandbytes__nf4` (bitsandbytes 0.50, `QuantState.as_dict`).
"""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families import Family
from vlft.model.quantise import Packed, Quantisation
from vlft.model_files import Slot, read_json, stored_slots, tensor_index

if TYPE_CHECKING:
    import torch

_STATE = re.compile(r"(?P<name>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)")


def is_stored_quantised(folder: Path) -> bool:
    """Whether a model folder says that its weights are quantised. Reads config.json alone."""
    config = read_json(folder / "config.json")
    return any(part.get("quantization_config") for part in (config, *config.values()) if isinstance(part, dict))


@dataclass(frozen=True, kw_only=True)
class QuantisedFiles:
    """The tensors of such a folder.

    Attributes:
        folder: its path.
        family: of the model.
        index: name of each tensor, as the files spell it -> file.
        states: published name of each quantised tensor -> the name of its format, as the files spell it.
        others: published names of the tensors that are not quantised -> name in the files, and slot.
    """

    folder: Path
    family: Family
    index: dict[str, Path]
    states: dict[str, str]
    others: dict[str, tuple[str, Slot]]

    @classmethod
    def of(cls, folder: Path, family: Family) -> QuantisedFiles:
        """Read the headers of a folder.

        Raises:
            CheckpointError: no tensor is quantised in 4 bits by bitsandbytes, or embedding or head are.
        """
        slots = stored_slots(folder)
        states = {found["name"]: name for name in slots if (found := _STATE.fullmatch(name)) is not None}
        if not states:
            raise CheckpointError(
                f"{folder}: config.json has a quantization_config, but no tensor is quantised by bitsandbytes in 4 "
                "bits. Only such quantised models are read."
            )
        if ends := sorted(states.keys() & {*family.ends, *map(family.published_name, family.ends)}):
            raise CheckpointError(
                f"{folder}: {ends[0]} is quantised. Quantised models are read if their embedding and head are not, as "
                "transformers leaves them by default. Use the model of 16 bits, with --bits 4 to quantise its layers."
            )
        parts = tuple(f"{name}." for name in states)
        rest = [name for name in slots if name not in states and not name.startswith(parts)]
        return cls(
            folder=folder,
            family=family,
            index=tensor_index(folder),
            states={family.published_name(name): state for name, state in states.items()},
            others={family.published_name(name): (name, slots[name]) for name in rest},
        )

    @property
    def quantisation(self) -> Quantisation:
        """Their format. If tensors have several, that of the first one."""
        kind: Any = "nf4" if "nf4" in self.kinds else "fp4"
        nested = any(name.endswith(".nested_absmax") for name in self.index)
        return Quantisation(kind=kind, double=nested)

    @property
    def kinds(self) -> set[str]:
        """The formats that occur: nf4, fp4 or both."""
        return {state.rpartition("__")[2] for state in self.states.values()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each tensor of the model, as the files spell it -> its shape, before it was packed."""
        found = {name: slot.shape for name, slot in self.others.values()}
        return found | dict(zip(self.packed_names(), map(self.shape, self.states), strict=True))

    def packed(self) -> Packed:
        """What is quantised."""
        counts = [math.prod(self.shape(name)) for name in self.states]
        own = self.packed_names()
        slots = stored_slots(self.folder)
        parts = {name for name in slots if name in own or name.startswith(tuple(f"{one}." for one in own))}
        return Packed(
            weights=sum(counts), nbytes=sum(_bytes(slots[name]) for name in parts), largest=max(counts, default=0)
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a quantised tensor before it was packed."""
        return tuple(self._state(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a quantised tensor before it was packed."""
        import torch

        found: torch.dtype = getattr(torch, self._state(name)["dtype"])
        return found

    def _state(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(bytes(self.tensor(self.states[name]).numpy()))
        return found

    def packed_names(self) -> list[str]:
        """Names of the quantised tensors, as the files spell them."""
        return [state.partition(".quant_state.")[0] for state in self.states.values()]

    def dense_bytes(self) -> int:
        """Bytes of the model without quantisation."""
        packed = sum(math.prod(self.shape(name)) * self.dtype(name).itemsize for name in self.states)
        return packed + sum(_bytes(slot) for _, slot in self.others.values())

    def tensor(self, stored: str) -> torch.Tensor:
        """A tensor as it is stored, by its name in the files."""
        from safetensors import safe_open

        with safe_open(self.index[stored], framework="pt") as file:
            return file.get_tensor(stored)

    def parts(self, name: str) -> tuple[torch.Tensor, Any]:
        """The packed values of a quantised tensor, and bitsandbytes' record of its scales, by its published name.

        Files may store the values as another dtype of the same bytes, such as bfloat16 (`bnb_4bit_quant_storage`, for
        FSDP). Here they are uint8 in any case, so that no conversion of floating-point tensors reaches them.
        """
        import torch
        from bitsandbytes import functional

        weight = self.states[name].partition(".quant_state.")[0]
        parts: dict[str, Any] = {
            key.removeprefix(f"{weight}."): self.tensor(key) for key in self.index if key.startswith(f"{weight}.")
        }
        return self.tensor(weight).view(torch.uint8).view(-1, 1), functional.QuantState.from_dict(
            parts, device=torch.device("cpu")
        )

    def weight(self, name: str) -> torch.Tensor:
        """A quantised tensor as its layer multiplies by it, in float32, by its published name."""
        import torch

        return unpacked(*self.parts(name), torch.float32)


def unpacked(values: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [O, D] of packed values.

    On a CPU with AVX-512, bitsandbytes (0.50) takes the scale of another block where a row begins inside a block, as
    with rows of 32 or 96 weights. So it is asked for rows of one block each.

    Args:
        values: of 4 bits.
        state: bitsandbytes' record of their scales.
        dtype: of the result, which is rounded once.
    """
    from bitsandbytes.functional import dequantize_4bit

    flat = copy.copy(state)
    count, block = math.prod(state.shape), state.blocksize
    flat.shape = (1, count) if count % block else (count // block, block)
    flat.dtype = dtype
    return dequantize_4bit(values.view(-1, 1), flat).view(tuple(state.shape))


def stored_shapes(folder: Path, family: Family) -> dict[str, tuple[int, ...]]:
    """Name of each tensor of a model, as its files spell it -> its shape; of a packed one, before it was packed."""
    if is_stored_quantised(folder):
        return QuantisedFiles.of(folder, family).shapes
    return {name: slot.shape for name, slot in stored_slots(folder).items()}


def _bytes(slot: Slot) -> int:
    """Bytes of a tensor, by the digits at the end of its dtype (U8, BF16, F32)."""
    digits = slot.dtype.lstrip("BFIU")
    return math.prod(slot.shape) * int(digits) // 8

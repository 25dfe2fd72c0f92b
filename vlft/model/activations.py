"""Memory that autograd saves between forward and backward, tower by tower: counted in a real pass, or estimated.

`Ledger` counts while a model runs, on any device. `Saved` runs the same code on tensors that have shapes and no
contents (`vlft.model.tracing`), on towers of two or three blocks. It takes seconds for a model of any size, needs no
weights, and estimates the memory of a GPU on a machine without one.

Letters: T tokens and P patches of a micro-batch, K its supervised rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vlft.families import Family
from vlft.model import adapt, depth, recurrent, standins, traced, tracing
from vlft.model.chosen import small as small_towers
from vlft.model.towers import Towers
from vlft.model.traced import Delta
from vlft.model.tracing import Load, Numbers

Part = Literal["vision", "merger", "language", "head"]
PARTS: tuple[Part, ...] = ("vision", "merger", "language", "head")


class Ledger:
    """A context manager around a forward pass.

    Args:
        model: prepared for training, with or without PEFT.
        given: tensors of the batch; they are not counted.

    Attributes:
        kept: part -> bytes of all storages saved for the backward pass, except weights and batch. Checkpointed blocks
            save their inputs.
    """

    def __init__(self, model: Any, given: Collection[Any] = ()) -> None:
        self.kept: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self._counted = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._counted |= {_storage(t) for t in given if isinstance(t, torch.Tensor)}
        self._alive: list[torch.Tensor] = []  # so that no address is used twice
        self._entered: list[Part] = ["language"]
        self._modules: list[tuple[torch.nn.Module, Part]] = [
            (adapt.tower(model, "vision"), "vision"),
            *((merger, "merger") for merger in adapt.mergers(model)),
            (adapt.tower(model, "language"), "language"),
            (adapt.head(model), "head"),
        ]
        self._blocks = [*adapt.blocks(model, "vision"), *adapt.blocks(model, "language")]
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Ledger:
        for module, part in self._modules:
            self._on(module.register_forward_pre_hook(lambda *_, part=part: self._entered.append(part)))
            self._on(module.register_forward_hook(lambda *_: self._leave()))
        for block in self._blocks:
            if getattr(block, "gradient_checkpointing", False):
                self._on(block.register_forward_pre_hook(self._into_block, with_kwargs=True))
        self._undo.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self._alive.clear()

    def _on(self, handle: Any) -> None:
        self._undo.callback(handle.remove)

    def _leave(self) -> None:
        self._entered.pop()

    def _into_block(self, block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return  # a frozen tower saves nothing
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self._save(tensor)

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = _storage(tensor)
        if storage not in self._counted:
            self._counted.add(storage)
            self._alive.append(tensor.detach())
            self.kept[self._entered[-1]] += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes saved between forward and backward.

    Attributes:
        kept: part -> bytes.
        block: bytes of the largest single block, which a checkpointed tower recomputes at one time.
    """

    kept: dict[Part, int]
    block: int


STEPS = 8  # of the delta rule in torch, in a model that is only traced


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What one micro-batch saves for the backward pass, for any choice of towers that recompute.

    Attributes:
        config: transformers' config of the top class.
        family: of the config.
        towers: what trains.
        load: the shapes of the micro-batch.
        numbers: the dtypes it computes in.
        device: the device whose kernels are assumed; on "cuda" this includes flash attention.
        fused: whether fused kernels run (`vlft.model.kernels`).
        delta: what computes the delta rule of gated delta nets on "cuda", in 16 bits.
    """

    config: Any
    family: Family
    towers: Towers
    load: Load
    numbers: Numbers
    device: Literal["cpu", "cuda"]
    fused: bool = False
    delta: Delta = "fla"

    def estimate(self, checkpointed: Collection[str] = ()) -> Estimate:
        """Estimate the bytes, with these towers (vision, language) recomputing their blocks."""
        whole = self._whole
        kept = {part: (self._recomputed if part in checkpointed else whole).kept[part] for part in PARTS}
        return Estimate(kept=kept, block=whole.block)

    @functools.cached_property
    def _whole(self) -> Estimate:
        return self._extrapolated(())

    @functools.cached_property
    def _recomputed(self) -> Estimate:
        return self._extrapolated(adapt.PARTS)

    def _extrapolated(self, checkpointed: Collection[str]) -> Estimate:
        """The whole model from small ones: the first and last block of each tower, and one of each kind between them.

        A tower's first block may save less than the others, and its last block shares its output with a merger.
        """
        kinds = depth.kinds(self.family.sizes(self.config), self.towers)
        ends = depth.ends(kinds, self.towers)

        def run(**between: int) -> dict[Part, int]:
            places = {part: sorted({*ends[part], *([between[part]] if part in between else [])}) for part in kinds}
            return _run(self, places["vision"], places["language"], checkpointed)

        base = run()
        kept, block = dict(base), 0
        for more in depth.additions(kinds, self.towers):
            found = run(**more.places)
            for part in PARTS:
                added = found[part] - base[part]
                # A block with a merger of its own also adds to the memory of mergers and language model.
                kept[part] += added * (more.language if part == "language" else more.vision)
                if part in more.places:
                    block = max(block, added)
        return Estimate(kept=kept, block=block or max(base[part] // len(ends[part]) for part in adapt.PARTS))


def _run(case: Saved, vision: Sequence[int], language: Sequence[int], checkpointed: Collection[str]) -> dict[Part, int]:
    """Part -> bytes saved by a model whose towers have only the blocks at these places."""
    small = case.family.with_blocks(case.config, vision=vision, language=language)
    with traced.step(
        small,
        case.family,
        small_towers(case.towers, vision=vision, language=language),
        numbers=case.numbers,
        device=case.device,
        fused=case.fused,
        delta=case.delta,
        checkpointed=checkpointed,
    ) as model:
        kernel = case.delta == "fla" and case.numbers.computing in standins.HALF
        chunked = case.device == "cuda" and not kernel and adapt.recurrent_layers(model)
        load = _short(case.load) if chunked else case.load
        batch = tracing.batch_of(case.family.sizes(small).vision, load)
        with tracing.autocast(case.device, case.numbers.autocast), Ledger(model, batch.values()) as ledger:
            model(**batch)
        return ledger.kept


def _short(load: Load) -> Load:
    """The same tokens in samples of a few chunks. The delta rule in torch then takes a few steps, and saves as much."""
    most = STEPS * recurrent.CHUNK
    lengths = [min(most, length - start) for length in load.lengths for start in range(0, length, most)]
    return replace(load, lengths=tuple(lengths))

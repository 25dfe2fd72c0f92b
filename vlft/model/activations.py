"""Memory that autograd saves between forward and backward, tower by tower: counted in a real pass, or estimated.

`Ledger` counts while a model runs, on any device. `estimate` runs the same code on tensors that have shapes and no
contents (`vlft.model.tracing`), on towers of one or two blocks. It takes seconds for a model of any size, needs no
weights, and estimates the memory of a GPU on a machine without one.

Letters: T tokens and P patches of a micro-batch, K its supervised rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves

from vlft.families import Family
from vlft.model import adapt, forward, kernels, segments, standins, tracing
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.load import empty_model
from vlft.model.scale import PixelScale, constants
from vlft.model.towers import Towers
from vlft.model.tracing import Load, Numbers

Part = Literal["vision", "merger", "language", "head"]
PARTS: tuple[Part, ...] = ("vision", "merger", "language", "head")


class Ledger:
    """A context manager around a forward pass.

    Args:
        model: prepared for training, with or without PEFT.
        given: values of the batch; their tensors are not counted.

    Attributes:
        kept: part -> bytes of all storages saved for the backward pass, except weights and batch. Checkpointed blocks
            save their inputs.
    """

    def __init__(self, model: Any, given: Collection[Any] = ()) -> None:
        self.kept: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self._counted = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._counted |= {_storage(t) for t in tree_leaves(list(given)) if isinstance(t, torch.Tensor)}
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


def estimate(
    config: Any,
    family: Family,
    towers: Towers,
    load: Load,
    numbers: Numbers,
    *,
    device: Literal["cpu", "cuda"],
    checkpointed: Collection[str] = (),
    fused: bool = False,
) -> Estimate:
    """Estimate what one micro-batch saves for the backward pass.

    Args:
        config: transformers' config of the top class.
        family: of the config.
        towers: what trains.
        load: the shapes of the micro-batch.
        numbers: the dtypes it computes in.
        device: the device whose kernels are assumed; on "cuda" this includes flash attention.
        checkpointed: towers (vision, language) whose blocks are recomputed.
        fused: whether RMSNorm and SwiGLU are fused (`vlft.model.kernels`).
    """
    sizes = family.sizes(config)
    depths: dict[Part, int] = {"vision": sizes.vision.depth, "language": len(sizes.text.layers)}

    def run(blocks: int, recomputing: Collection[str]) -> dict[Part, int]:
        return _run(config, family, towers, load, numbers, blocks, recomputing, device=device, fused=fused)

    one, two = run(1, checkpointed), run(2, checkpointed)
    # In a model of one block, the first block is also the last, so mergers that read either would share their input.
    kept = {
        part: one[part] + (depths[part] - 1) * (two[part] - one[part]) if part in depths else two[part]
        for part in PARTS
    }
    whole = [run(blocks, ()) for blocks in (1, 2)] if checkpointed else [one, two]
    return Estimate(kept=kept, block=max(whole[1][part] - whole[0][part] for part in depths))


def _run(
    config: Any,
    family: Family,
    towers: Towers,
    load: Load,
    numbers: Numbers,
    blocks: int,
    checkpointed: Collection[str],
    *,
    device: str,
    fused: bool,
) -> dict[Part, int]:
    """Part -> bytes saved by a model whose towers have this number of blocks."""
    small = family.with_depth(config, blocks)
    model: Any = empty_model(small, family)
    half = numbers.computing in standins.HALF
    kernel = None if device == "cpu" else standins.attend if half else standins.attend_in_float32
    for part in adapt.PARTS:
        segments.use_kernel(model, part, "traced" if kernel else "sdpa", kernel)
    if fused:
        kernels.fuse(model, standins.fused_functions())
    forward.bind(model, PixelScale(mean=(0.0,) * 3, std=(1.0,) * 3))
    # This cache outlives the call, so it must not hold tensors without contents.
    constants.cache_clear()
    try:
        with torch.random.fork_rng(devices=[]):
            model = apply_towers(model, family, towers, masters=False)
            with tracing.without_contents(), torch.device(device):
                tracing.fill(model, numbers)
                checkpoint_activations(model, checkpointed)
                model.train()
                batch = tracing.batch_of(family.sizes(small).vision, load)
                with tracing.autocast(device, numbers.autocast), Ledger(model, batch.values()) as ledger:
                    model(**batch)
                return ledger.kept
    finally:
        constants.cache_clear()

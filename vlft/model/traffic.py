"""Count what a step on a GPU does: kernels, bytes of each kind, reads by the host, peak memory, and what costs most.

It observes operations on tensors without contents (`vlft.model.tracing`), so no GPU is needed. Every operation that is
not a view is one kernel, which reads each input and writes each output once. `vlft.model.forecast` runs the step.
"""

from __future__ import annotations

import bisect
import contextlib
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from vlft.model import adapt, tracing
from vlft.model.cards import Card
from vlft.model.tracing import Op

#: `matmul`: of base weights. `adapter`: matmuls of LoRA matrices. `elementwise`: everything else.
Kind = Literal["matmul", "adapter", "attention", "elementwise"]
KINDS: tuple[Kind, ...] = ("matmul", "adapter", "attention", "elementwise")
Phase = Literal["forward", "backward", "optimizer"]

#: Share of the data sheet's peak that large matmuls reach, and of its bandwidth that other kernels reach: 640 of 989
#: TFLOP/s and 2.7 of 3.35 TB/s on an H100. Assumed, until `scripts/first_contact.sh` has measured them on a card.
MATMUL_SHARE = 0.65
MEMORY_SHARE = 0.81
#: Seconds that the host needs to start a kernel, with torch's and transformers' Python code around it. Assumed.
HOST_SECONDS = 10e-6

#: Operations that give memory without writing it, or that do nothing on the device.
_NOTHING = (
    *("aten.empty", "aten.empty_like", "aten.new_empty", "aten.new_empty_strided", "aten.empty_strided"),
    *("aten._unsafe_view", "aten.detach", "aten.alias", "aten.lift_fresh", "aten.is_same_size", "prim.device"),
)
#: They read as many values of their first tensor as they write.
_GATHERS = ("aten.embedding", "aten.index_select", "aten.index", "aten.gather")
#: They overwrite their first tensor, or make one of its shape, without reading it.
_OVERWRITES = (
    *("aten.copy_", "aten.zero_", "aten.fill_", "aten.zeros_like", "aten.ones_like", "aten.full_like"),
    *("aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.rand_like", "aten.randn_like"),
)
_ATTENTION = ("vlft_traced.attend", "vlft_traced.delta_rule")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class Squares:
    """What the work of an attention call depends on, besides its heads.

    Attributes:
        total: sum of the squared lengths of its segments; with causal branches twice the number of visible scores.
        causal: whether half of the scores are masked.
    """

    total: int
    causal: bool


@dataclass(kw_only=True)
class Cost:
    """Counts of some operations. They add up.

    Attributes:
        kernels: number of operations that run on the device.
        bytes: kind -> bytes read and written.
        flops: kind -> floating-point operations of matmuls and attention.
        kind_seconds: kind -> predicted time on the device.
    """

    kernels: float = 0
    bytes: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    flops: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    kind_seconds: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    @property
    def seconds(self) -> float:
        """Predicted time on the device."""
        return sum(self.kind_seconds.values())

    def add(self, other: Cost, times: float = 1) -> None:
        """Add the counts of other operations, `times` over."""
        self.kernels += times * other.kernels
        for kind in KINDS:
            self.bytes[kind] += times * other.bytes[kind]
            self.flops[kind] += times * other.flops[kind]
            self.kind_seconds[kind] += times * other.kind_seconds[kind]


class Traffic:
    """An observer of operations (`vlft.model.tracing.Watch`), for one step.

    Args:
        model: with or without PEFT.
        card: the GPU whose time is predicted.
        rank: of LoRA matrices; None without LoRA.
        squares: (tokens, segments) of an attention call -> its lengths.

    Attributes:
        costs: (phase, module) -> counts. Blocks of a tower share a name.
        reads: number of operations for which the host waits.
        peak: most bytes that were allocated at one time, from `start` on.
    """

    def __init__(self, model: Any, *, card: Card, rank: int | None, squares: Mapping[tuple[int, int], Squares]) -> None:
        if card.tflops is None or card.tb_s is None:
            raise ValueError("the speed of the card is not known")
        self.costs: dict[tuple[Phase, str], Cost] = {}
        self.reads = 0
        self.peak = 0
        self.phase: Phase = "forward"
        self._card, self._rank, self._squares = card, rank, squares
        self._matmul_rate = MATMUL_SHARE * card.tflops * 1e12
        self._memory_rate = MEMORY_SHARE * card.tb_s * 1e12
        self._flash_rate = card.flash * card.tflops * 1e12
        self._model = model
        self._names: list[str] = [""]
        self._base: set[int] = set()  # storages of weights that are no adapter's, and of their converted copies
        self._nodes: list[tuple[int, str]] = []  # (number of the next node of the graph, module), in order
        self._replayed: str | None = None  # the module of the backward node that runs
        self._held = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}

    # ---- where an operation belongs

    @contextlib.contextmanager
    def modules(self) -> Iterator[None]:
        """A context in which operations are assigned to the modules of the model."""
        handles = []
        inside = {
            id(part) for module in self._model.modules() if hasattr(module, "base_layer") for part in module.modules()
        }
        inside -= {id(module) for module in self._model.modules() if hasattr(module, "base_layer")}
        for name, module in adapt.bare(self._model).named_modules():
            if name and id(module) not in inside:  # a layer with LoRA is one function, unless its parts have hooks
                label = _NUMBER.sub("*", name.removeprefix("model."))
                handles.append(module.register_forward_pre_hook(lambda *_, label=label: self._enter(label)))
                handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, label: str) -> None:
        self._names.append(label)
        self._record()

    def _leave(self) -> None:
        self._names.pop()
        self._record()

    def _record(self) -> None:
        if self.phase == "forward":
            self._nodes.append((torch._C._autograd._get_sequence_nr(), self._names[-1]))  # type: ignore[attr-defined]

    def backward_of(self, node: Any) -> None:
        """Assign the operations that follow to the module whose forward made this node of the graph."""
        place = bisect.bisect_right(self._nodes, node._sequence_nr(), key=lambda one: one[0]) - 1
        self._replayed = self._nodes[place][1] if place >= 0 else ""

    def _module(self) -> str:
        if self.phase == "optimizer":
            return "optimizer"
        # In backward, a module's own forward runs only to recompute it.
        inside = self._names[-1] or (self._replayed if self.phase == "backward" else "")
        return inside or "model"

    # ---- operations

    def __call__(self, op: Op) -> None:
        for tensor in op.outputs:
            self._track(tensor)
        self.reads += tracing.waits(op) is not None  # also learns from operations of the host which memory is pinned
        if not any(t.device.type == "cuda" for t in (*op.inputs, *op.outputs)):
            return
        if not is_kernel(op):
            return
        if op.name == "aten._to_copy" and self._of_base(op.inputs):
            self._base.update(tensor.untyped_storage()._cdata for tensor in op.outputs)
        key = (self.phase, self._module())
        self.costs.setdefault(key, Cost()).add(self._cost(op))

    def _cost(self, op: Op) -> Cost:
        kind = self._kind(op)
        moved, work = _bytes(op), self._flops(op)
        rate = self._flash_rate if kind == "attention" else self._matmul_rate
        cost = Cost(kernels=1)
        cost.bytes[kind], cost.flops[kind] = moved, work
        cost.kind_seconds[kind] = max(moved / self._memory_rate, work / rate)
        return cost

    def _kind(self, op: Op) -> Kind:
        if op.name.startswith(_ATTENTION):
            return "attention"
        if (sides := _sides(op)) is None:
            return "elementwise"
        # The rank alone does not tell them apart: it may be the width of a base layer, such as 32 heads of a delta net.
        adapter = self._rank in sides and op.outputs[0].ndim == 2 and not self._of_base(op.inputs)
        return "adapter" if adapter else "matmul"

    def _of_base(self, tensors: Iterable[torch.Tensor]) -> bool:
        return any(tensor.untyped_storage()._cdata in self._base for tensor in tensors)

    def _flops(self, op: Op) -> float:
        if op.name.startswith("vlft_traced.attend"):
            backward = op.name.endswith("backward")
            q, cu = op.inputs[1 if backward else 0], op.inputs[-1]
            tokens, heads, size = q.shape
            known = self._squares[tokens, cu.shape[0] - 1]
            # Two matmuls forward and five backward, as flash kernels compute the scores again.
            return (10 if backward else 4) * known.total * heads * size / (2 if known.causal else 1)
        sides = _sides(op)
        if sides is None:
            return 0.0
        work = 2.0
        for side in sides:
            work *= side
        if op.name in ("aten.bmm", "aten.baddbmm", "aten.baddbmm_"):
            work *= op.outputs[0].shape[0]
        return work

    # ---- memory

    def start(self, tensors: Iterator[torch.Tensor]) -> None:
        """Count these tensors as allocated, such as weights and optimizer states."""
        adapters = {id(weight) for name, weight in self._model.named_parameters() if "lora_" in name}
        for tensor in tensors:
            self._track(tensor)
            if isinstance(tensor, torch.nn.Parameter) and id(tensor) not in adapters:
                self._base.add(tensor.untyped_storage()._cdata)

    def _track(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self._held -= self._storages.pop(key)[1]
            self._base.discard(key)

        self._storages[key] = (weakref.ref(storage, gone), size)
        self._held += size
        self.peak = max(self.peak, self._held)


def is_kernel(op: Op) -> bool:
    """Whether an operation on tensors of a GPU runs there, rather than making a view or reserving memory."""
    return not op.function.is_view and op.name not in _NOTHING


def _bytes(op: Op) -> float:
    """Bytes that a kernel reads and writes."""
    written = _written(op)
    if op.name in _GATHERS:
        return 2 * sum(map(_size, op.outputs)) + sum(map(_size, op.inputs[1:]))
    read = sum(map(_size, op.inputs))
    if op.name in _OVERWRITES or op.options.get("beta") == 0:
        read -= _size(op.inputs[0])
    given = op.options.get("out")
    read -= sum(_size(out) for out in (given if isinstance(given, tuple | list) else (given,)) if out is not None)
    return read + written


def _written(op: Op) -> float:
    """Bytes that a kernel writes: new tensors, and arguments that it changes."""
    changed = [one for one, argument in _arguments(op) if argument.alias_info and argument.alias_info.is_write]
    given = {id(tensor) for tensor in op.inputs}
    return sum(map(_size, changed)) + sum(_size(out) for out in op.outputs if id(out) not in given)


def _arguments(op: Op) -> Iterator[tuple[torch.Tensor, Any]]:
    """Each tensor among the arguments, with its entry in the operation's schema."""
    schema = op.function._schema.arguments
    for place, argument in enumerate(schema):
        value = op.arguments[place] if place < len(op.arguments) else op.options.get(argument.name)
        if op.name == "aten._fused_adamw_" and argument.name == "grads":
            continue  # it only writes gradients that it has to unscale
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield tensor, argument


def _size(tensor: torch.Tensor) -> float:
    """Bytes of a tensor; what is repeated with a stride of zero counts once."""
    many = 1
    for side, stride in zip(tensor.shape, tensor.stride(), strict=True):
        many *= side if stride else min(side, 1)
    return many * tensor.element_size() if tensor.device.type == "cuda" else 0


def _sides(op: Op) -> tuple[int, int, int] | None:
    """Rows, inner size and columns of a matmul; None for an operation of another kind."""
    short = op.name.removeprefix("aten.")
    if short in ("mm", "bmm", "_grouped_mm"):  # with experts, each row meets one of them
        a, b = op.inputs[:2]
    elif short in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
        a, b = op.inputs[1:3]
    elif short == "convolution":
        weight, out = op.inputs[1], op.outputs[0]
        return out.shape[0] * out[0, 0].numel(), weight[0].numel(), weight.shape[0]
    elif short == "convolution_backward":
        grad, _, weight = op.inputs[:3]
        times = sum(isinstance(one, torch.Tensor) for one in op.outputs[:2])
        return times * grad.shape[0] * grad[0, 0].numel(), weight[0].numel(), weight.shape[0]
    else:
        return None
    return a.shape[-2], a.shape[-1], b.shape[-1]

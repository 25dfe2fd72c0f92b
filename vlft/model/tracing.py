"""Run a training step on tensors that have shapes and no contents, also for a GPU on a machine without one.

torch's FakeTensorMode runs the same Python code as a real step: forward, recomputation, optimizer. This module adds
what it lacks: autocast for a GPU that is absent, a backward pass without a device, and observers of each operation.
`vlft.model.standins` has stand-ins for kernels from outside torch. `vlft.model.activations` counts memory this way, and
the tests check what a GPU would refuse or wait for.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vlft.families import VisionSizes
from vlft.model import shapes

#: Operations for which the host needs the shape or value of the result.
READS = (
    *("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal"),
    *("aten.unique_dim", "aten._unique", "aten._unique2", "aten.unique_consecutive"),
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """The shapes of a micro-batch.

    Attributes:
        lengths: tokens of each sample, or of each segment of queries if answers share a prompt.
        vision_lengths: patches of each still or time step.
        supervised: rows of the head.
        key_lengths: keys of each segment; empty: as `lengths`.
    """

    lengths: tuple[int, ...]
    vision_lengths: tuple[int, ...]
    supervised: int
    key_lengths: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def patches(self) -> int:
        return sum(self.vision_lengths)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The dtypes of a run.

    Attributes:
        stored: of frozen weights.
        trained: of trained weights.
        autocast: of matmuls under autocast; None without autocast.
    """

    stored: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None

    @property
    def computing(self) -> torch.dtype:
        """The dtype of matmuls."""
        return self.autocast or self.stored


def numbers_of(stored: torch.dtype, half: torch.dtype | None, *, deepspeed: bool) -> Numbers:
    """The dtypes that training chooses.

    Args:
        stored: dtype of the base's files.
        half: bf16; None for float32.
        deepspeed: DeepSpeed holds float32 masters itself. Without it, trained weights are float32, under autocast.
    """
    if half is None:
        return Numbers(stored=torch.float32, trained=torch.float32, autocast=None)
    if deepspeed:
        return Numbers(stored=half, trained=half, autocast=None)
    return Numbers(stored=stored, trained=torch.float32, autocast=half)


@contextlib.contextmanager
def without_contents() -> Iterator[None]:
    """A context in which tensors have no contents, and CUDA is available as a device even without a GPU.

    Operations accept real tensors; their results have no contents either.
    """
    amp: Any = torch.cuda.amp.common
    with contextlib.ExitStack() as undo:
        # torch.autocast switches itself off without a GPU.
        undo.enter_context(_replaced(amp, "amp_definitely_not_available", lambda: False))
        undo.enter_context(_replaced(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True))
        # transformers asks for the generation of a GPU before it computes experts; grouped matmuls need 8.0.
        undo.enter_context(_replaced(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
        # The id of the backward pass: a checkpoint recomputes its block once for each id. See `backward`.
        undo.enter_context(_replaced(torch._C, "_current_graph_task_id", lambda: 1))
        undo.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def autocast(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """torch.autocast, or a context without effect for a dtype of None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def fill(model: torch.nn.Module, numbers: Numbers | None = None) -> None:
    """Replace tensors of the meta device by tensors without contents on the current device.

    Args:
        model: on the meta device; changed in place.
        numbers: dtypes of the weights; None: each keeps its own.
    """
    made: dict[int, Any] = {}  # a tied head stays tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    dtype = parameter.dtype
                    if numbers is not None:
                        dtype = numbers.trained if parameter.requires_grad else numbers.stored
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    made[-id(parameter)] = parameter  # kept alive, so that its id is not used again
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def batch_of(vision: VisionSizes, load: Load) -> dict[str, Any]:
    """The inputs of the flat forward (`vlft.model.forward.FORWARD_KEYS`) for a load, on the current device."""
    tokens, unit = load.tokens, vision.cell
    patches = max(unit, -(-load.patches // unit) * unit)  # a share of a pack may end within a picture
    segments = load.vision_lengths if patches == load.patches else (patches,)
    merged = patches // unit if load.patches else 0
    return {
        **({"branches": shapes.branches(load.key_lengths)} if load.key_lengths else {}),
        "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "position_ids": torch.zeros(4, 1, tokens, dtype=torch.int64),
        "cu_seqlens": torch.zeros(len(load.lengths) + 1, dtype=torch.int32),
        "lengths": tuple(load.lengths),
        "still_pixels": torch.zeros(patches * vision.channels * vision.patch**2, dtype=torch.uint8),
        "video_pixels": torch.zeros(0, dtype=torch.uint8),
        "vision_grid": torch.ones(len(segments), 3, dtype=torch.int64),
        "vision_cu_seqlens": torch.zeros(len(segments) + 1, dtype=torch.int32),
        "vision_lengths": tuple(segments),
        "vision_positions": torch.zeros(patches, 2, dtype=torch.int64),
        "vision_meta": shapes.vision_meta(vision, segments),
        "vision_rows": torch.zeros(merged, dtype=torch.int64),
        "supervised_rows": torch.zeros(load.supervised, dtype=torch.int64),
        "targets": torch.zeros(load.supervised, dtype=torch.int64),
    }


# ---- observers of operations


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation, after it ran.

    Attributes:
        name: for example `aten.mm`.
        function: torch's object for it, which can tell whether it is a view.
        inputs: all tensors among its arguments.
        outputs: all tensors among its results. A tensor that is written in place is in both.
        arguments: its positional arguments.
        options: its keyword arguments.
    """

    name: str
    function: Any
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Watch(TorchDispatchMode):
    """A context that calls observers with each operation, in forward, backward and optimizer."""

    def __init__(self, *observers: Callable[[Op], object]) -> None:
        super().__init__()
        self._observers = observers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op = Op(
            name=str(func.overloadpacket),
            function=func,
            inputs=_tensors((args, kwargs)),
            outputs=_tensors(out),
            arguments=tuple(args),
            options=dict(kwargs or {}),
        )
        for observe in self._observers:
            observe(op)
        return out


def _tensors(tree: Any) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


class WaitsError(RuntimeError):
    """An operation that makes the host wait for the device."""


#: Tensors in pinned memory. Tensors without contents do not know where they are.
_pinned: WeakIdKeyDictionary = WeakIdKeyDictionary()


def waits(op: Op) -> str | None:
    """What makes the host wait: a value on a GPU is read, or a tensor is copied between host and GPU.

    Non-blocking copies from pinned memory to the GPU do not wait. From other memory they may wait for all queued work.
    None for an operation that does not wait.
    """
    if op.options.get("pin_memory") or op.name == "aten._pin_memory":
        for made in op.outputs:
            _pinned[made] = True
    places = {t.device.type for t in (*op.inputs, *op.outputs)}
    if "cuda" not in places:
        return None
    if op.name in READS:
        return op.name
    if op.name in ("aten._to_copy", "aten.copy_") and len(places) > 1:
        to, source = op.inputs[:2] if op.name == "aten.copy_" else (op.outputs[0], op.inputs[0])
        if not (op.options.get("non_blocking") and to.device.type == "cuda" and source in _pinned):
            return f"{op.name} between {' and '.join(sorted(places))}"
    if op.name in ("aten.index", "aten.index_put", "aten.index_put_") and any(
        t.dtype is torch.bool for t in op.inputs[1:]
    ):
        return f"{op.name} with a mask"
    return None


def refuse_waits(op: Op) -> None:
    """An observer that raises if the host waits for a GPU.

    Raises:
        WaitsError: the operation waits; the message names it.
    """
    if (what := waits(op)) is not None:
        raise WaitsError(f"{what} waits for the device")


# ---- backward


def backward(loss: torch.Tensor, entering: Callable[[Any], object] = lambda node: None) -> None:
    """`loss.backward()` for tensors without contents: torch's own engine needs a device that exists.

    It walks the graph in Python. Like the engine it sums and checks each gradient, casts it to its tensor's dtype, and
    frees what a node has saved when that node is done, if the caller keeps no reference to the loss.

    Args:
        loss: a scalar.
        entering: called with each node of the graph before it runs.

    Raises:
        RuntimeError: a gradient is on a different device than its tensor.
    """
    root: Any = loss.grad_fn
    uses: collections.Counter[Any] = collections.Counter()
    seen, stack = {root}, [root]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                uses[following] += 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    gradients: dict[Any, dict[int, torch.Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    del loss, root, seen  # a node keeps all nodes after it
    with torch.no_grad():
        while ready:
            node = ready.pop()
            entering(node)
            results = _step_back(node, gradients.pop(node, {}))
            for (following, place), gradient in zip(node.next_functions, results, strict=True):
                if following is None:
                    continue
                if gradient is not None:
                    # Before the sum: functions of several inputs return gradients that are not reduced yet.
                    gradient = _as_engine(gradient, following._input_metadata[place], following)
                    held = gradients.setdefault(following, {})
                    held[place] = held[place] + gradient if place in held else gradient
                uses[following] -= 1
                if not uses[following]:
                    del uses[following]
                    ready.append(following)


def _step_back(node: Any, held: dict[int, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """The gradients that one node of the graph passes on."""
    if not held:
        return (None,) * len(node.next_functions)
    given = [held.get(i) for i in range(len(node._input_metadata))]
    custom = isinstance(node, torch.autograd.function.BackwardCFunction)
    results = node.apply(*given) if custom else node(*given)
    results = results if isinstance(results, tuple) else (results,)
    # A function in Python also returns gradients for arguments that are no tensors; ours have those last.
    many = len(node.next_functions)
    if any(result is not None for result in results[many:]):
        raise RuntimeError(f"{node.name()} has arguments that are no tensors before its tensors")
    return results[:many]


def _as_engine(gradient: torch.Tensor, meta: Any, node: Any) -> torch.Tensor:
    """A gradient with the shape and dtype of the tensor that it belongs to."""
    if gradient.device != meta.device:
        raise RuntimeError(f"{node.name()}: a gradient on {gradient.device} for a tensor on {meta.device}")
    if tuple(gradient.shape) != tuple(meta.shape):
        gradient = gradient.sum_to_size(meta.shape)
    return gradient.to(meta.dtype)

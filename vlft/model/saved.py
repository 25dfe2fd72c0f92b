"""What autograd keeps from forward to backward, tower by tower: counted as tensors are saved, or foretold.

`Ledger` counts while a model runs, on any device. `foretell` runs the same code on tensors that have shapes and no
contents (torch's FakeTensorMode), on towers of one or two blocks, so a model of any size is counted in seconds and
without its weights. For a GPU, too, where there is none: stand-ins keep what its kernels would keep.

Letters: T tokens and P patches of a micro-batch, K its supervised rows.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlft.families import Family
from vlft.model import attention, forward, kernels
from vlft.model.load import empty_model
from vlft.model.towers import Towers, apply_towers, checkpoint_activations

Part = Literal["vision", "merger", "language", "head"]
PARTS: tuple[Part, ...] = ("vision", "merger", "language", "head")


class Ledger:
    """A context around a forward pass.

    Args:
        model: prepared, PEFT-wrapped or not.
        given: tensors of the batch, which are there anyway.

    Attributes:
        kept: part -> bytes of all storages kept for the backward pass, weights and batch aside. Where blocks are
            checkpointed, what goes into them is kept.
    """

    def __init__(self, model: Any, given: Collection[Any] = ()) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.kept: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self._seen = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._seen |= {_storage(t) for t in given if isinstance(t, torch.Tensor)}
        self._alive: list[torch.Tensor] = []  # so that no address is given out twice
        self._now: list[Part] = ["language"]
        visual, language = base.model.visual, base.model.language_model
        self._modules: list[tuple[torch.nn.Module, Part]] = [
            (visual, "vision"),
            (visual.merger, "merger"),
            (language, "language"),
            (base.lm_head, "head"),
        ]
        self._blocks = [*visual.blocks, *language.layers]
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Ledger:
        for module, part in self._modules:
            self._on(module.register_forward_pre_hook(lambda *_, part=part: self._now.append(part)))
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
        self._now.pop()

    def _into_block(self, block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return  # a frozen tower keeps nothing
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self._save(tensor)

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        place = _storage(tensor)
        if place not in self._seen:
            self._seen.add(place)
            self._alive.append(tensor.detach())
            self.kept[self._now[-1]] += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True, kw_only=True)
class Load:
    """The shapes of a micro-batch.

    Attributes:
        lengths: tokens of each sample. vision_lengths: patches of each still or time step; supervised: K.
    """

    lengths: tuple[int, ...]
    vision_lengths: tuple[int, ...]
    supervised: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def patches(self) -> int:
        return sum(self.vision_lengths)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """In which numbers a run computes.

    Attributes:
        stored: of frozen weights. trained: of those that train. autocast: what matmuls round to, or None.
    """

    stored: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None

    @property
    def computing(self) -> torch.dtype:
        """Of matmuls."""
        return self.autocast or self.stored


def numbers_of(stored: torch.dtype, half: torch.dtype | None, *, deepspeed: bool) -> Numbers:
    """As training chooses them.

    Args:
        stored: dtype of the base's files. half: bf16 or fp16, None for neither.
        deepspeed: which keeps the float32 masters itself; else they are the weights, under autocast.
    """
    if half is None:
        return Numbers(stored=torch.float32, trained=torch.float32, autocast=None)
    if deepspeed:
        return Numbers(stored=half, trained=half, autocast=None)
    return Numbers(stored=stored, trained=torch.float32, autocast=half)


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """Bytes kept from forward to backward.

    Attributes:
        kept: by part. block: of the hungriest single block, which is what a checkpointed tower makes anew.
    """

    kept: dict[Part, int]
    block: int


def foretell(
    config: Any,
    family: Family,
    towers: Towers,
    load: Load,
    numbers: Numbers,
    *,
    device: Literal["cpu", "cuda"],
    checkpointed: Collection[str] = (),
    fused: bool = False,
) -> Foretold:
    """What a micro-batch will keep.

    Args:
        config: of the top class. towers: what trains.
        device: whose kernels; a GPU's have flash attention.
        checkpointed: towers (vision, language) whose blocks recompute.
        fused: with fused RMSNorm and SwiGLU (`vlft.model.kernels`).
    """
    depths: dict[Part, int] = {"vision": config.vision_config.depth, "language": config.text_config.num_hidden_layers}

    def run(blocks: int, recomputing: Collection[str]) -> dict[Part, int]:
        return _run(config, family, towers, load, numbers, blocks, recomputing, device=device, fused=fused)

    one, two = run(1, checkpointed), run(2, checkpointed)
    kept = {part: one[part] + (depths.get(part, 1) - 1) * (two[part] - one[part]) for part in PARTS}
    whole = [run(blocks, ()) for blocks in (1, 2)] if checkpointed else [one, two]
    return Foretold(kept=kept, block=max(whole[1][part] - whole[0][part] for part in depths))


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
    """Of towers of so many blocks."""
    small = copy.deepcopy(config)
    small.vision_config.depth, small.text_config.num_hidden_layers = blocks, blocks
    if getattr(small.text_config, "layer_types", None) is not None:  # one entry a layer
        small.text_config.layer_types = small.text_config.layer_types[:blocks]
    scale = forward.PixelScale(mean=(0.0,) * 3, std=(1.0,) * 3)
    model: Any = empty_model(small, family)
    _attend_on(model, device)
    if fused:
        _fuse(model)
    forward.bind(model, scale)
    # Kept between calls, so none of it may be made here, without contents.
    forward._constants.cache_clear()
    try:
        with torch.random.fork_rng(devices=[]):
            model = apply_towers(model, family, towers, masters=False)
            with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
                _fill(model, numbers)
                checkpoint_activations(model, checkpointed)
                model.train()
                batch = _batch(small, load)
                with _autocast(numbers.autocast, device), Ledger(model, batch.values()) as ledger:
                    model(**batch)
                return ledger.kept
    finally:
        forward._constants.cache_clear()


@contextlib.contextmanager
def _autocast(dtype: torch.dtype | None, device: str) -> Iterator[None]:
    """As torch.autocast, which is off for a GPU that is not there."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


class _Keeps(torch.autograd.Function):
    """A kernel that makes one tensor like its first, and keeps what it is given, with or without its result.

    It has no backward: what a forward pass leaves behind is counted, and nothing is computed.
    """

    @staticmethod
    def forward(ctx: Any, result_too: bool, per_row: int, *inputs: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(inputs[0])
        small = inputs[0].new_empty((*inputs[0].shape[:per_row], 1), dtype=torch.float32)  # sums of rows
        ctx.save_for_backward(*inputs, small, *([result] if result_too else []))
        return result


def _attend_on(model: torch.nn.Module, device: str) -> None:
    """Attention as on a device; flash kernels keep query, key, value, result and a number for each head and token."""
    attention.install(model, "sdpa", dtype=torch.float32, device=torch.device("cpu"))
    if device == "cpu":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return _Keeps.apply(True, 2, q, k, v)

    name = "vlft_flash_foretold"
    AttentionInterface.register(name, attention._attend(flash))
    AttentionMaskInterface.register(name, sdpa_mask)
    config: Any = model.config
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation_internal = name


def _fuse(model: Any) -> None:
    """RMSNorm and SwiGLU that keep what Liger's keep (0.8.5): the norm's input, gate and up."""
    language = model.model.language_model
    norms = [
        language.norm,
        *(n for layer in language.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    for norm in norms:
        kernels.fuse_rms_norm(norm, lambda x, weight, eps: _Keeps.apply(False, x.ndim - 1, x))
    for layer in language.layers:
        kernels.fuse_swiglu(layer.mlp, lambda gate, up: _Keeps.apply(False, 0, gate, up))


def _fill(model: torch.nn.Module, numbers: Numbers) -> None:
    """Put tensors of the right place and dtype, without contents, in the place of those of the meta device."""
    made: dict[int, Any] = {}  # a tied head stays tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    dtype = numbers.trained if parameter.requires_grad else numbers.stored
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    made[-id(parameter)] = parameter  # alive, so that its id is not given out again
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _batch(config: Any, load: Load) -> dict[str, Any]:
    """What the flat forward takes, of the right shapes."""
    vision, tokens = config.vision_config, load.tokens
    unit = vision.spatial_merge_size**2
    patches = max(unit, -(-load.patches // unit) * unit)  # a share of a pack need not be whole pictures
    segments = load.vision_lengths if patches == load.patches else (patches,)
    merged = patches // unit if load.patches else 0
    side = vision.patch_size
    return {
        "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "position_ids": torch.zeros(4, 1, tokens, dtype=torch.int64),
        "cu_seqlens": torch.zeros(len(load.lengths) + 1, dtype=torch.int32),
        "lengths": tuple(load.lengths),
        "still_patches": torch.zeros(patches, 3, side, side, dtype=torch.uint8),
        "video_patches": torch.zeros(0, 3, vision.temporal_patch_size, side, side, dtype=torch.uint8),
        "vision_grid": torch.ones(len(segments), 3, dtype=torch.int64),
        "vision_cu_seqlens": torch.zeros(len(segments) + 1, dtype=torch.int32),
        "vision_lengths": tuple(segments),
        "vision_positions": torch.zeros(patches, 2, dtype=torch.int64),
        "vision_rows": torch.zeros(merged, dtype=torch.int64),
        "supervised_rows": torch.zeros(load.supervised, dtype=torch.int64),
        "targets": torch.zeros(load.supervised, dtype=torch.int64),
    }

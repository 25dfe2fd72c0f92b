"""Choose an attention kernel for each tower: the fastest that is installed and passes a self-test on the device.

Letters: H heads, G key/value heads, T tokens of the row, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from vlft.errors import ConfigError
from vlft.model import adapt
from vlft.model.segments import Heads, Kernel, attend_segments, heads_of, run_kernel, use_kernel

Backend = Literal["fa4", "flash_attn", "varlen", "sdpa"]
BACKENDS: tuple[Backend, ...] = ("fa4", "flash_attn", "varlen", "sdpa")  # the order "auto" tries them in
INSTALL = {
    "fa4": "pip install flash-attn-4",
    "flash_attn": "pip install 'vlft[flash-attn]'",
    "varlen": "pip install 'torch>=2.11' (a CUDA build)",
}

Choice = Literal["auto"] | Backend

#: Tokens of the self-test's segments. Some have more than 128, as in training: cuDNN before 9.24 uses another kernel
#: for shorter ones. Not all of them are multiples of a kernel's block.
LENGTHS = (200, 7, 161)
#: Largest difference allowed in the self-test, as a share of its segment's largest value. bfloat16 rounds to 8 bits
#: (up to 0.02 on a CPU). A kernel that mixes samples differs by about 1.
TOLERANCE = 0.05


def _load_kernel(backend: Backend) -> Kernel:
    """The varlen kernel of a backend.

    Raises:
        ImportError: the package is not installed.
    """
    if backend == "varlen":
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.varlen import varlen_attn

        def varlen(q, k, v, cu, longest, *, scale, causal):
            # torch 2.11 accepts fewer key/value heads without a flag; torch 2.12 and later need it.
            gqa: dict[str, Any] = (
                {"enable_gqa": True} if q.shape[1] != k.shape[1] and torch.__version__ >= "2.12" else {}
            )
            window = (-1, 0) if causal else (-1, -1)
            # Not cuDNN, which torch 2.15 would prefer on Hopper. It builds a plan for each new geometry (about 42 ms,
            # pytorch/pytorch#191576), and no two packs have the same lengths.
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=window, **gqa)

        return varlen
    if backend == "fa4":
        from flash_attn.cute import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func

    def flash(q, k, v, cu, longest, *, scale, causal):
        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
            softmax_scale=scale, causal=causal,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return flash


def self_test(kernel: Kernel, tower: Heads, *, dtype: torch.dtype, device: torch.device, fused: bool = False) -> float:
    """Largest difference, forward and gradient, between a varlen kernel in 16 bits and sdpa in float32.

    The kernel gets the same inputs as in a layer of the tower, through `run_kernel`. Segments differ in length, so a
    kernel that mixes samples cannot pass.

    Args:
        kernel: the kernel to test.
        tower: the attention of one tower.
        dtype: the dtype that the run computes in, bfloat16 or float16.
        device: where the kernel runs.
        fused: whether rotary embedding is fused (`vlft.model.rotary`).

    Returns:
        the difference as a share of its segment's largest value; NaN if any value is NaN.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    widths = [tower.heads * tower.head_dim, *[tower.kv_heads * tower.head_dim] * 2]
    drawn = [
        torch.randn(tokens, width, generator=generator).to(device, dtype)
        for width in ([sum(widths)] if tower.joined else widths)
    ]
    results = []
    for exact in (False, True):
        leaves = [(x.float() if exact else x.clone()).requires_grad_() for x in drawn]
        q, k, v = _as_in_a_layer(leaves, tower, fused=fused)
        if exact:
            out = attend_segments(q, k, v, LENGTHS, scale=tower.scale, causal=tower.causal)
        else:
            out = run_kernel(kernel, q, k, v, cu_seqlens, max(LENGTHS), scale=tower.scale, causal=tower.causal)
        out.float().square().sum().backward()
        gradients = [x.grad.float() for x in leaves if x.grad is not None]
        if tower.joined:
            gradients = list(gradients[0].split(widths, dim=1))
        results.append([out[0].detach().float().flatten(1), *gradients])
    shares = [
        (a - b).abs().max() / b.abs().max()
        for found, wanted in zip(*results, strict=True)
        for a, b in zip(found.split(LENGTHS), wanted.split(LENGTHS), strict=True)
    ]
    return float(torch.stack(shares).max())  # not Python's max, which ignores a NaN that is not its first argument


def _as_in_a_layer(
    projected: Sequence[torch.Tensor], tower: Heads, *, fused: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value [1, H or G, T, D] in the layout and dtype that a layer passes on after rotary embedding.

    The language model computes rotary embedding in the dtype of hidden states; float32 is tested here, the wider case.
    The ViT computes it in float32 and casts back. Fused, it writes the projection's dtype and layout in both towers.

    Args:
        projected: [T, (H + 2G) * D], or three of [T, H * D], [T, G * D] twice.
        tower: the attention of the tower.
        fused: whether rotary embedding is fused.
    """
    if tower.joined:
        parts = list(projected[0].unflatten(1, (3, tower.heads, tower.head_dim)).unbind(1))
    else:
        parts = [x.unflatten(1, (-1, tower.head_dim)) for x in projected]
    one = torch.ones(len(parts[0]), 1, tower.head_dim, device=parts[0].device)  # a rotation by zero
    for i, part in enumerate([] if fused else parts[:2]):
        turned = part.float() * one
        if tower.partial_rotary:
            heads_first = turned.transpose(0, 1)
            turned = torch.cat(heads_first.chunk(2, dim=-1), dim=-1).transpose(0, 1)
        parts[i] = turned.to(part.dtype) if tower.joined else turned
    q, k, v = (part.transpose(0, 1)[None] for part in parts)
    return q, k, v


def choose_backend(
    choice: Choice, tower: Heads, *, device: torch.device, dtype: torch.dtype
) -> tuple[Backend, list[str]]:
    """The backend for one tower, and why faster ones were not used.

    Args:
        choice: "auto" or a name of `BACKENDS`.
        tower: the attention of the tower.
        device: where it computes; kernels other than sdpa need CUDA.
        dtype: what it computes in; kernels other than sdpa need 16 bits.

    Returns:
        the backend, and a remark for each one that was rejected.

    Raises:
        ConfigError: a backend requested by name cannot be used; the message says why and how to get it.
    """
    if choice == "sdpa":
        return "sdpa", []
    general = _problem_of_all(device=device, dtype=dtype)
    if general and choice == "auto":
        return "sdpa", [f"{', '.join(BACKENDS[:-1])}: {general}"]
    remarks: list[str] = []
    for backend in BACKENDS if choice == "auto" else (choice,):
        if backend == "sdpa":
            return "sdpa", remarks
        problem = general or _problem(backend, tower, device=device, dtype=dtype)
        if not problem:
            return backend, remarks
        if choice != "auto":
            raise ConfigError(
                f"--attn {choice}: {problem}. To get it: {INSTALL[choice]}. Or use --attn auto, which uses the "
                "fastest that works."
            )
        remarks.append(f"{backend}: {problem}")
    raise AssertionError("auto ends with sdpa, which always works")


def _problem_of_all(*, device: torch.device, dtype: torch.dtype) -> str:
    """Why no varlen kernel can be used here; empty if one may be."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16, this run computes in {dtype}".replace("torch.", "")
    return ""


def _problem(backend: Backend, tower: Heads, *, device: torch.device, dtype: torch.dtype) -> str:
    """Why a varlen kernel cannot be used; empty if it can."""
    try:
        kernel = _load_kernel(backend)
        found = [self_test(kernel, tower, dtype=dtype, device=device, fused=fused) for fused in (False, True)]
    except Exception as error:  # noqa: BLE001 - kernels refuse by assert, and their compilers raise their own classes
        return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    worst = next((share for share in found if not share < TOLERANCE), None)
    if worst is None:
        return ""
    return f"its self-test differs from sdpa by {worst:.3g} of the largest value (allowed: {TOLERANCE:g})"


def install(
    model: torch.nn.Module,
    choice: Choice,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Backend]:
    """Choose a backend per tower and make the model use it.

    Args:
        model: a loaded base (the top class).
        choice: `--attn`.
        dtype: what the run computes in (bf16 under autocast).
        device: where the run computes, if the model is not there yet.
        say: called on a GPU with a line for each backend that was rejected, and why.

    Returns:
        tower -> backend.

    Raises:
        ConfigError: a backend requested by name cannot be used.
    """
    device = device or next(model.parameters()).device
    chosen: dict[str, Backend] = {}
    for tower, heads in heads_of(adapt.sizes_of(model)).items():
        backend, remarks = choose_backend(choice, heads, device=device, dtype=dtype)
        if device.type == "cuda":
            for remark in remarks:
                say(f"attention of {tower}: not {remark}")
        use_kernel(model, tower, backend, None if backend == "sdpa" else _load_kernel(backend))
        chosen[tower] = backend
    return chosen

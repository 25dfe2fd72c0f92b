"""Choose an attention kernel for each tower: the fastest that is installed and passes a self-test on the device.

Where several pass, they are timed once, when a run starts. `vlft.model.trial` tests and times them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from vlft.errors import ConfigError
from vlft.families import Sizes
from vlft.model import adapt
from vlft.model.geometry import with_repeating
from vlft.model.segments import Heads, Kernel, heads_of, use_kernel
from vlft.model.trial import TIMED_LENGTHS, TOLERANCE, self_test, time_kernel

Backend = Literal["fa4", "fa3", "flash_attn", "varlen", "sdpa"]
BACKENDS: tuple[Backend, ...] = ("fa4", "fa3", "flash_attn", "varlen", "sdpa")
#: What "auto" tests: also cuDNN, by torch's varlen, which is no choice because it suits few GPUs. Of kernels that are
#: equally fast, the first is used.
Candidate = Backend | Literal["cudnn"]
CANDIDATES: tuple[Candidate, ...] = ("fa4", "fa3", "flash_attn", "varlen", "cudnn")
INSTALL = {
    "fa4": "pip install flash-attn-4",
    "fa3": "pip install 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    "flash_attn": "pip install 'vlft[flash-attn]'",
    "varlen": "pip install 'torch>=2.11' (a CUDA build)",
}

Choice = Literal["auto"] | Backend

#: A kernel that is this much slower than the fastest counts as equally fast: times vary, and runs should not.
SAME = 1.05


def load_kernel(backend: Candidate) -> Kernel:
    """The varlen kernel of a backend.

    Raises:
        ImportError: the package is not installed, or its version lacks the kernel.
    """
    if backend == "varlen":
        from torch.nn.attention import SDPBackend

        # Not cuDNN, which torch 2.15 would prefer on Hopper. It builds a plan for each new geometry (about 42 ms,
        # pytorch/pytorch#191576), and no two packs have the same lengths.
        return torch_varlen(SDPBackend.FLASH_ATTENTION)
    if backend == "cudnn":
        from torch.nn.attention import SDPBackend

        if torch.__version__ < "2.15":  # earlier versions do not use cuDNN here, or build a plan at each call
            raise ImportError(f"torch 2.15 is needed, this is {torch.__version__}")
        return with_repeating(torch_varlen(SDPBackend.CUDNN_ATTENTION))
    if backend == "fa4":
        from flash_attn.cute import flash_attn_varlen_func
    elif backend == "fa3":
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func

    def flash(q, k, v, cu, longest, *, scale, causal, cu_k=None, longest_k=None):
        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu if cu_k is None else cu_k,
            max_seqlen_q=longest, max_seqlen_k=longest if longest_k is None else longest_k,
            softmax_scale=scale, causal=causal,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return flash


def torch_varlen(backend: Any = None) -> Kernel:
    """torch's own varlen attention.

    Args:
        backend: an `SDPBackend`; None: the one that torch chooses.
    """
    from torch.nn.attention import sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    def varlen(q, k, v, cu, longest, *, scale, causal, cu_k=None, longest_k=None):
        # torch 2.11 accepts fewer key/value heads without a flag; torch 2.12 and later need it.
        gqa: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and torch.__version__ >= "2.12" else {}
        window = (-1, 0) if causal else (-1, -1)
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            cu_k, longest_k = cu if cu_k is None else cu_k, longest if longest_k is None else longest_k
            return varlen_attn(q, k, v, cu, cu_k, longest, longest_k, scale=scale, window_size=window, **gqa)

    return varlen


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The choice for one tower.

    Attributes:
        backend: the fastest one that works.
        kernel: its kernel; None for sdpa.
        remarks: a remark for each backend that was rejected.
        seconds: backend -> seconds of a call, where several were timed.
    """

    backend: Candidate
    kernel: Kernel | None = None
    remarks: tuple[str, ...] = ()
    seconds: Mapping[Candidate, float] = field(default_factory=dict)


def choose_backend(
    choice: Choice,
    tower: Heads,
    *,
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int] = TIMED_LENGTHS,
    layers: int = 1,
    branches: bool = False,
) -> Chosen:
    """The backend for one tower, and why others were not used.

    Args:
        choice: "auto" or a name of `BACKENDS`. A backend requested by name is tested, and not timed.
        tower: the attention of the tower.
        device: where it computes; kernels other than sdpa need CUDA.
        dtype: what it computes in; kernels other than sdpa need 16 bits.
        lengths: segments of the row on which kernels are timed.
        layers: number of layers with this attention.
        branches: whether answers will share a prompt; kernels are then tested with fewer queries than keys, too.

    Raises:
        ConfigError: a backend requested by name cannot be used; the message says why and how to get it.
    """
    if choice == "sdpa":
        return Chosen(backend="sdpa")
    general = _problem_of_all(device=device, dtype=dtype)
    if general and choice == "auto":
        return Chosen(backend="sdpa", remarks=(f"{', '.join(BACKENDS[:-1])}: {general}",))
    if choice != "auto":
        problem = general
        try:
            kernel = None if general else _tested(choice, tower, device=device, dtype=dtype, branches=branches)
        except _Rejected as error:
            problem = str(error)
        if problem:
            raise ConfigError(
                f"--attn {choice}: {problem}. To get it: {INSTALL[choice]}. Or use --attn auto, which uses the "
                "fastest that works."
            )
        return Chosen(backend=choice, kernel=kernel)
    remarks: list[str] = []
    passed: dict[Candidate, Kernel] = {}
    for backend in CANDIDATES:
        try:
            passed[backend] = _tested(backend, tower, device=device, dtype=dtype, branches=branches)
        except _Rejected as error:
            remarks.append(f"{backend}: {error}")
    seconds: dict[Candidate, float] = {}
    for backend, kernel in passed.items() if len(passed) > 1 else ():
        try:
            seconds[backend] = time_kernel(kernel, tower, lengths, layers=layers, dtype=dtype, device=device)
        except Exception as error:  # noqa: BLE001 - as in the self-test; this kernel failed on a longer row
            remarks.append(f"{backend}: {_described(error)}")
    fastest = min(seconds.values(), default=0.0)
    fast = [backend for backend in passed if len(passed) == 1 or seconds.get(backend, float("inf")) <= SAME * fastest]
    if not fast:
        return Chosen(backend="sdpa", remarks=tuple(remarks))
    return Chosen(backend=fast[0], kernel=passed[fast[0]], remarks=tuple(remarks), seconds=seconds)


def _problem_of_all(*, device: torch.device, dtype: torch.dtype) -> str:
    """Why no varlen kernel can be used here; empty if one may be."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16, this run computes in {dtype}".replace("torch.", "")
    return ""


class _Rejected(Exception):
    """A backend cannot be used."""


def _tested(
    backend: Candidate, tower: Heads, *, device: torch.device, dtype: torch.dtype, branches: bool = False
) -> Kernel:
    """The varlen kernel of a backend, which has passed its self-test.

    Raises:
        _Rejected: it cannot be used; the message says why.
    """
    cases = [(shared, fused) for shared in ([False, True] if branches else [False]) for fused in (False, True)]
    try:
        kernel = load_kernel(backend)
        found = [
            (shared, self_test(kernel, tower, dtype=dtype, device=device, fused=fused, branches=shared))
            for shared, fused in cases
        ]
    except Exception as error:  # kernels refuse by assert, and their compilers raise their own classes
        raise _Rejected(_described(error)) from error
    for shared, share in found:
        if not share < TOLERANCE:  # also if it is NaN
            case = " with fewer queries than keys" if shared else ""
            raise _Rejected(
                f"its self-test{case} differs from sdpa by {share:.3g} of the largest value (allowed: {TOLERANCE:g})"
            )
    return kernel


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")


def _timed_row(sizes: Sizes, part: adapt.Part) -> tuple[tuple[int, ...], int]:
    """Segments of the row on which kernels of a tower are timed, and the number of layers with softmax attention."""
    if part == "language":
        return TIMED_LENGTHS, sum(layer.recurrent is None for layer in sizes.text.layers)
    return sizes.vision.full_windows(TIMED_LENGTHS) or TIMED_LENGTHS, sizes.vision.depth


def install(
    model: torch.nn.Module,
    choice: Choice,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    branches: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Candidate]:
    """Choose a backend per tower and make the model use it.

    Args:
        model: a loaded base (the top class).
        choice: `--attn`.
        dtype: what the run computes in (bf16 under autocast).
        device: where the run computes, if the model is not there yet.
        branches: whether answers will share a prompt (`branches` of a batch). The kernel of the language model then has
            to pass its self-test with fewer queries than keys. Models with gated delta nets never share a prompt.
        say: called on a GPU with a line for each backend that was rejected, and why, and with the times of the others.

    Returns:
        tower -> backend.

    Raises:
        ConfigError: a backend requested by name cannot be used.
    """
    device = device or next(model.parameters()).device
    sizes = adapt.sizes_of(model)
    chosen: dict[str, Candidate] = {}
    for tower, heads in heads_of(sizes).items():
        lengths, layers = _timed_row(sizes, tower)
        shares = branches and tower == "language" and all(layer.recurrent is None for layer in sizes.text.layers)
        how: dict[str, Any] = {"lengths": lengths, "layers": layers, "branches": shares}
        made = choose_backend(choice, heads, device=device, dtype=dtype, **how)
        if device.type == "cuda":
            for remark in made.remarks:
                say(f"attention of {tower}: not {remark}")
            if made.seconds:
                times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in made.seconds.items())
                say(f"attention of {tower}: {sum(lengths):,} tokens forward and backward take {times}")
        use_kernel(model, tower, made.backend, made.kernel)
        chosen[tower] = made.backend
    return chosen

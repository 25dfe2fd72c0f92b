"""Attention over flat rows: several samples end to end, none of which may see another.

One function per backend, all with the call shape of transformers' attention interface. Without `cu_seq_lens_q`
(generation, other people's batches) each goes transformers' own sdpa way.

Letters: H heads, G key/value heads, T tokens of the row, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from vlft.errors import ConfigError

Backend = Literal["fa4", "flash_attn", "varlen", "sdpa"]
BACKENDS: tuple[Backend, ...] = ("fa4", "flash_attn", "varlen", "sdpa")  # the order "auto" tries them in
INSTALL = {
    "fa4": "pip install flash-attn-4",
    "flash_attn": "pip install 'vlft[flash-attn]'",
    "varlen": "pip install 'torch>=2.11' (a CUDA build)",
}

Choice = Literal["auto"] | Backend
Kernel = Callable[..., torch.Tensor]


def attend_segments(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    causal: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Plain `scaled_dot_product_attention`, segment by segment; neighbours of one length share a call.

    Args:
        query_1HTD, key_1GTD, value_1GTD: [1, H, T, D] and twice [1, G, T, D] with H a multiple of G.
        lengths: Python ints that sum to T, so that nothing has to be read back from a device.
        scale: factor on the scores.
        causal: whether a token sees only those before it.
        dropout: probability, in training.

    Returns:
        output_1THD: [1, T, H, D].
    """
    outputs, start = [], 0
    for length, group in itertools.groupby(lengths):
        count = sum(1 for _ in group)
        end = start + count * length
        # [1, H, n*L, D] -> [n, H, L, D]
        q, k, v = (
            x[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for x in (query_1HTD, key_1GTD, value_1GTD)
        )
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [n*L, H, D]
        start = end
    return torch.cat(outputs)[None]


def _attend(kernel: Kernel | None) -> Callable[..., tuple[torch.Tensor, None]]:
    """Transformers' attention interface around a varlen kernel; None is sdpa per segment."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        segment_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        if cu_seq_lens_q is None:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal
            )
        if kernel is None or query.device.type == "cpu":
            if segment_lengths is None:  # the stock path (generate) hands the ViT only tensors
                segment_lengths = cu_seq_lens_q.diff().tolist()
            return attend_segments(
                query, key, value, segment_lengths, scale=scaling, causal=causal, dropout=dropout
            ), None
        q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
        out_THD = kernel(q_THD, k_TGD, v_TGD, cu_seq_lens_q, max_length_q, scale=scaling, causal=causal)
        return out_THD[None], None

    return attention


def _load_kernel(backend: Backend) -> Kernel:
    """The varlen kernel of a backend.

    Raises:
        ImportError: the package is not installed.
    """
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        def varlen(q, k, v, cu, longest, *, scale, causal):
            # torch 2.11 takes fewer key/value heads without being told so; from 2.12 on it wants the flag.
            gqa: dict[str, Any] = (
                {"enable_gqa": True} if q.shape[1] != k.shape[1] and torch.__version__ >= "2.12" else {}
            )
            window = (-1, 0) if causal else (-1, -1)
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


def self_test(kernel: Kernel, *, heads: int, kv_heads: int, head_dim: int, causal: bool, device: torch.device) -> float:
    """Largest difference, forward and gradient, between a varlen kernel in bfloat16 and sdpa in float32.

    Three segments of different lengths, so that a kernel that mixes samples cannot pass.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = (33, 7, 24)
    cu = torch.tensor([0, 33, 40, 64], dtype=torch.int32, device=device)
    q, k, v = (
        torch.randn(64, n, head_dim, generator=generator).to(device, torch.bfloat16)
        for n in (heads, kv_heads, kv_heads)
    )
    scale = head_dim**-0.5
    results = []
    for exact in (False, True):
        leaves = [x.detach().float().requires_grad_() if exact else x.detach().requires_grad_() for x in (q, k, v)]
        if exact:
            q_1HTD, k_1GTD, v_1GTD = (x.transpose(0, 1)[None] for x in leaves)
            out = attend_segments(q_1HTD, k_1GTD, v_1GTD, lengths, scale=scale, causal=causal)[0]
        else:
            out = kernel(*leaves, cu, max(lengths), scale=scale, causal=causal)
        out.float().square().sum().backward()
        results.append([out.detach().float(), *(x.grad.float() for x in leaves if x.grad is not None)])
    # Not Python's max, which passes over a NaN that is not its first argument.
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]).max())


def choose_backend(
    choice: Choice, *, heads: int, kv_heads: int, head_dim: int, causal: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Backend, list[str]]:
    """The backend for one tower, and what was tried and passed over.

    Args:
        choice: "auto" or a name of `BACKENDS`.
        heads, kv_heads, head_dim, causal: the tower's attention.
        device, dtype: it computes in; kernels other than sdpa need CUDA and a 16-bit dtype.

    Raises:
        ConfigError: a backend asked for by name cannot be used; says why and how to get it.
    """
    remarks: list[str] = []
    candidates: tuple[Backend, ...] = BACKENDS if choice == "auto" else (choice,)
    for backend in candidates:
        if backend == "sdpa":
            return "sdpa", remarks
        problem = ""
        if device.type != "cuda":
            problem = f"needs a CUDA device, this is {device.type}"
        elif dtype not in (torch.bfloat16, torch.float16):
            problem = f"needs bf16 or fp16, this run computes in {dtype}".replace("torch.", "")
        else:
            try:
                kernel = _load_kernel(backend)
                worst = self_test(
                    kernel, heads=heads, kv_heads=kv_heads, head_dim=head_dim, causal=causal, device=device
                )
                if worst < 0.03:  # bfloat16 has 8 bits; a kernel that mixes samples is off by the order of 1
                    return backend, remarks
                problem = f"its self-test differs from sdpa by {worst:.3g} of the largest value (allowed: 0.03)"
            except (ImportError, RuntimeError, TypeError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if choice != "auto":
            raise ConfigError(
                f"--attn {choice}: {problem}. To get it: {INSTALL[choice]}. Or use --attn auto, which takes the "
                "fastest that works."
            )
        remarks.append(f"{backend}: {problem}")
    raise AssertionError("auto ends with sdpa, which always works")


def install(
    model: torch.nn.Module,
    choice: Choice,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Backend]:
    """Choose a backend per tower and make the model use it.

    transformers gives the ViT one variable-length call only under a name with "flash" in it, and refuses such names at
    load; so the model is loaded with sdpa and renamed here (works on 5.17 to 5.23).

    Args:
        model: a loaded Qwen2-VL (the top class).
        choice: `--attn`.
        dtype: of the computation (bf16 under autocast).
        device: of the computation, where the model is not on it yet.
        say: told, on a GPU, which backends were passed over and why.

    Returns:
        tower -> backend.

    Raises:
        ConfigError: a backend asked for by name cannot be used.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config: Any = model.config
    device = device or next(model.parameters()).device
    text, vision = config.text_config, config.vision_config
    shapes = {
        "language": {
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
            "head_dim": text.hidden_size // text.num_attention_heads,
            "causal": True,
        },
        "vision": {
            "heads": vision.num_heads,
            "kv_heads": vision.num_heads,
            "head_dim": vision.embed_dim // vision.num_heads,
            "causal": False,
        },
    }
    chosen: dict[str, Backend] = {}
    for tower, shape in shapes.items():
        backend, remarks = choose_backend(choice, device=device, dtype=dtype, **shape)
        if device.type == "cuda":
            for remark in remarks:
                say(f"attention of {tower}: not {remark}")
        name = f"vlft_flash_{backend}"
        AttentionInterface.register(name, _attend(None if backend == "sdpa" else _load_kernel(backend)))
        AttentionMaskInterface.register(name, sdpa_mask)
        for part in (vision,) if tower == "vision" else (config, text):
            part._attn_implementation_internal = name
        chosen[tower] = backend
    return chosen

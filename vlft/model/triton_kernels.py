"""Triton kernels for work that torch does in several passes over memory: norms and rotary embedding.

Neighbours: `vlft.model.triton_activations` and `vlft.model.triton_convolution`, to which the rest of this page also
applies. Each function launches one kernel, without autograd (`vlft.model.fused` adds it). All compute in float32,
read any floating dtype and round once, when they write. Importing this module needs triton, which comes with CUDA
builds of torch. With TRITON_INTERPRET=1 the kernels run on a CPU, slowly; the tests use that.

Sizes that change with each pack are not specialised, so that a new number of tokens compiles nothing. Offsets of rows
are int64: [40k, 70k] does not fit in int32.

Letters: R rows, C channels; T tokens, H heads, D channels of a head, N channels that rotary embedding turns.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

#: Elements of a tile: enough work for the 128 threads of a program, without spilling registers.
TILE = 4096


# ---- norms


@triton.jit(do_not_specialize=["rows"])
def _norm(
    y_ptr, x_ptr, weight_ptr, bias_ptr, gate_ptr, mean_ptr, scale_ptr, rows, x_stride, gate_stride, channels, eps,
    offset, CENTRED: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    mask = (row < rows)[:, None] & inside[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, axis=1) / channels
        tl.store(mean_ptr + row, mean, mask=row < rows)
        x = tl.where(mask, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / channels + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset
    y = x * scale[:, None] * weight[None, :]
    if CENTRED:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    tl.store(y_ptr + row[:, None] * channels + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "programs"])
def _norm_backward(
    dx_ptr, dgate_ptr, dweight_ptr, dbias_ptr, dy_ptr, x_ptr, weight_ptr, gate_ptr, mean_ptr, scale_ptr, rows, programs,
    dy_stride, x_stride, gate_stride, channels, offset, CENTRED: tl.constexpr, GATED: tl.constexpr,
    FOR_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset
    if FOR_WEIGHT:
        dweight = tl.zeros([BLOCK], dtype=tl.float32)
        dbias = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
        if CENTRED:
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
            x = tl.where(mask, x - mean[:, None], 0.0)
        x = x * scale[:, None]
        if GATED:
            gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
            share = tl.sigmoid(gate)
            dgate = dy * x * weight[None, :] * share * (1.0 + gate * (1.0 - share))
            dgate_at = dgate_ptr + row[:, None] * channels + column[None, :]
            tl.store(dgate_at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
            dy *= gate * share
        slope = dy * weight[None, :]
        dx = slope - x * (tl.sum(slope * x, axis=1) / channels)[:, None]
        if CENTRED:
            dx -= (tl.sum(slope, axis=1) / channels)[:, None]
        dx *= scale[:, None]
        tl.store(dx_ptr + row[:, None] * channels + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if FOR_WEIGHT:
            dweight += tl.sum(dy * x, axis=0)
            dbias += tl.sum(dy, axis=0)
    if FOR_WEIGHT:
        tl.store(dweight_ptr + program * channels + column, dweight, mask=inside)
        if CENTRED:
            tl.store(dbias_ptr + program * channels + column, dbias, mask=inside)


def norm(
    x_RC: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor | None,
    gate_RC: torch.Tensor | None,
    *,
    eps: float,
    offset: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm, or with a bias LayerNorm.

    Args:
        x_RC: rows at any stride, channels without gaps.
        weight_C: any floating dtype.
        bias_C: likewise; with it, the mean of a row is subtracted first.
        gate_RC: rows as `x_RC`; the result is multiplied by `silu(gate)`.
        eps: added to the variance.
        offset: added to the weight.
        dtype: of the result.

    Returns:
        y_RC, mean_R (empty without a bias) and scale_R, the reciprocal deviation; the last two in float32.
    """
    rows, channels = x_RC.shape
    y_RC = torch.empty((rows, channels), dtype=dtype, device=x_RC.device)
    scale_R = torch.empty(rows, dtype=torch.float32, device=x_RC.device)
    mean_R = torch.empty_like(scale_R if bias_C is not None else scale_R[:0])
    if rows:
        settings = _tile(channels)
        grid = (triton.cdiv(rows, settings["ROWS"]),)
        bias = weight_C if bias_C is None else bias_C  # a pointer that is not read
        gate = x_RC if gate_RC is None else gate_RC
        with on_device_of(x_RC):
            _norm[grid](
                y_RC, x_RC, weight_C, bias, gate, mean_R, scale_R, rows, x_RC.stride(0), gate.stride(0), channels, eps,
                offset, CENTRED=bias_C is not None, GATED=gate_RC is not None, **settings,
            )  # fmt: skip
    return y_RC, mean_R, scale_R


def norm_backward(
    dy_RC: torch.Tensor,
    x_RC: torch.Tensor,
    weight_C: torch.Tensor,
    gate_RC: torch.Tensor | None,
    mean_R: torch.Tensor,
    scale_R: torch.Tensor,
    *,
    offset: float,
    centred: bool,
    for_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of `norm`.

    Args:
        dy_RC: rows at any stride, channels without gaps.
        x_RC: as given to `norm`.
        weight_C: as given to `norm`.
        gate_RC: as given to `norm`.
        mean_R: from `norm`.
        scale_R: from `norm`.
        offset: as given to `norm`.
        centred: whether `norm` had a bias.
        for_weight: whether the gradients of weight and bias are needed.

    Returns:
        dx_RC in x's dtype, dweight_C and dbias_C in the weight's or None, dgate_RC in the gate's or None.
    """
    rows, channels = x_RC.shape
    dx_RC = torch.empty((rows, channels), dtype=x_RC.dtype, device=x_RC.device)
    dgate_RC = None if gate_RC is None else torch.empty((rows, channels), dtype=gate_RC.dtype, device=x_RC.device)
    settings = _tile(channels)
    programs = triton.cdiv(rows, settings["ROWS"])
    if for_weight:  # each program adds up the rows that it processes
        programs = max(1, min(programs, 2 * _processors(x_RC.device)))
    shape = (programs if for_weight else 0, channels)
    parts_PC, bias_parts_PC = (torch.empty(shape, dtype=torch.float32, device=x_RC.device) for _ in range(2))
    gate, dgate = (x_RC, dx_RC) if gate_RC is None else (gate_RC, dgate_RC)
    if programs:
        with on_device_of(x_RC):
            _norm_backward[(programs,)](
                dx_RC, dgate, parts_PC, bias_parts_PC, dy_RC, x_RC, weight_C, gate, mean_R, scale_R, rows, programs,
                dy_RC.stride(0), x_RC.stride(0), gate.stride(0), channels, offset, CENTRED=centred,
                GATED=gate_RC is not None, FOR_WEIGHT=for_weight, **settings,
            )  # fmt: skip
    dweight_C = parts_PC.sum(0).to(weight_C.dtype) if for_weight else None
    dbias_C = bias_parts_PC.sum(0).to(weight_C.dtype) if for_weight and centred else None
    return dx_RC, dweight_C, dbias_C, dgate_RC


def _tile(channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "ROWS": max(1, min(16, TILE // block)), "num_warps": min(16, max(4, block // 512))}


# ---- rotary embedding


@triton.jit
def _turn(
    out_ptr, x_ptr, out_token, out_head, x_token, x_head, heads, token, cos_1, cos_2, sin_1, sin_2,
    HEADS: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr, REST: tl.constexpr, BACKWARD: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the heads of one token. The first half of the turned channels is paired with the second."""
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, HALF_BLOCK)
    mask = (head < heads)[:, None] & (channel < HALF)[None, :]
    x_at = x_ptr + token * x_token + head[:, None] * x_head + channel[None, :]
    out_at = out_ptr + token * out_token + head[:, None] * out_head + channel[None, :]
    x_1 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        y_1 = x_1 * cos_1 + x_2 * sin_2
        y_2 = x_2 * cos_2 - x_1 * sin_1
    else:
        y_1 = x_1 * cos_1 - x_2 * sin_1
        y_2 = x_2 * cos_2 + x_1 * sin_2
    tl.debug_barrier()  # the result may be written over the input
    tl.store(out_at, y_1.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_at + HALF, y_2.to(out_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        channel = TURNED + tl.arange(0, REST_BLOCK)
        mask = (head < heads)[:, None] & (channel < TURNED + REST)[None, :]
        x = tl.load(x_ptr + token * x_token + head[:, None] * x_head + channel[None, :], mask=mask, other=0.0)
        tl.store(
            out_ptr + token * out_token + head[:, None] * out_head + channel[None, :],
            x.to(out_ptr.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def _rotary(
    q_out_ptr, k_out_ptr, v_out_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr,
    q_out_token, q_out_head, k_out_token, k_out_head, v_out_token, v_out_head,
    q_token, q_head, k_token, k_head, v_token, v_head, cos_token, sin_token, q_heads, k_heads,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr, REST: tl.constexpr,
    BACKWARD: tl.constexpr, COPIES: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    WHOLE_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, HALF_BLOCK)
    inside = channel < HALF
    cos_at, sin_at = cos_ptr + token * cos_token + channel, sin_ptr + token * sin_token + channel
    cos_1 = tl.load(cos_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_at + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_at + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    _turn(
        q_out_ptr, q_ptr, q_out_token, q_out_head, q_token, q_head, q_heads, token, cos_1, cos_2, sin_1, sin_2,
        Q_HEADS, HALF, TURNED, REST, BACKWARD, HALF_BLOCK, REST_BLOCK,
    )  # fmt: skip
    _turn(
        k_out_ptr, k_ptr, k_out_token, k_out_head, k_token, k_head, k_heads, token, cos_1, cos_2, sin_1, sin_2,
        K_HEADS, HALF, TURNED, REST, BACKWARD, HALF_BLOCK, REST_BLOCK,
    )  # fmt: skip
    if COPIES:
        head = tl.arange(0, K_HEADS)
        whole = tl.arange(0, WHOLE_BLOCK)
        mask = (head < k_heads)[:, None] & (whole < TURNED + REST)[None, :]
        v = tl.load(v_ptr + token * v_token + head[:, None] * v_head + whole[None, :], mask=mask, other=0.0)
        tl.store(
            v_out_ptr + token * v_out_token + head[:, None] * v_out_head + whole[None, :],
            v.to(v_out_ptr.dtype.element_ty),
            mask=mask,
        )


def rotate(
    given: tuple[torch.Tensor, ...],
    cos_TN: torch.Tensor,
    sin_TN: torch.Tensor,
    results: tuple[torch.Tensor, ...],
    *,
    backward: bool = False,
) -> None:
    """Rotary embedding of query and key: `x * cos + rotate_half(x) * sin` on their first N channels.

    Args:
        given: query [T, H, D] and key [T, G, D] at any strides, with channels without gaps; a third tensor, shaped as
            the key, is copied.
        cos_TN: for each token. Its halves may differ.
        sin_TN: likewise.
        results: written, shaped as `given` and of any floating dtype; may be the same tensors.
        backward: apply the transposed rotation, which maps gradients of results to gradients of `given`.
    """
    query, key = given[:2]
    tokens, heads, channels = query.shape
    turned, keys = cos_TN.shape[1], key.shape[1]
    if not tokens:
        return
    inputs, outputs = ((*tensors, *tensors[1:2])[:3] for tensors in (given, results))  # without a third: not read
    half, rest = turned // 2, channels - turned
    with on_device_of(query):
        _rotary[(tokens,)](
            *outputs, *inputs, cos_TN, sin_TN,
            *(stride for x in (*outputs, *inputs) for stride in x.stride()[:2]),
            cos_TN.stride(0), sin_TN.stride(0), heads, keys,
            Q_HEADS=triton.next_power_of_2(heads), K_HEADS=triton.next_power_of_2(keys),
            HALF=half, TURNED=turned, REST=rest, BACKWARD=backward, COPIES=len(given) > 2,
            HALF_BLOCK=triton.next_power_of_2(half), REST_BLOCK=triton.next_power_of_2(max(1, rest)),
            WHOLE_BLOCK=triton.next_power_of_2(channels), num_warps=4,
        )  # fmt: skip


def on_device_of(tensor: torch.Tensor) -> torch.cuda.device:
    """A context on the tensor's device; triton launches on the current one. Without a GPU it has no effect."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

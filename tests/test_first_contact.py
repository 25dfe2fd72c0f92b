"""The measurements of scripts/first_contact.sh: kernels by kind, and figures beside what the forecast assumes."""

from __future__ import annotations

import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vlft.bench.fake import STORY
from vlft.bench.predicted import of_step
from vlft.bench.probe import Compared, Probe
from vlft.bench.profiled import Profiled, beside, by_kind, kind_of
from vlft.demo.tiny import tiny_config, tiny_processor
from vlft.families import QWEN2_VL
from vlft.model.cards import CARDS
from vlft.model.forecast import Step
from vlft.model.towers import Towers
from vlft.model.tracing import numbers_of


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("matmul", [
            "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
            "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_tn",
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>",
            "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>",
            "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nchw",
            "aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::mkldnn_convolution",
        ]),
        ("attention", [
            "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t>>",
            "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMain>>>",
            "kernel_cutlass_kernel_flash_attncuteflash_bwdFlashAttentionBackwardSm90_object_at",
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64x128_4x1x1_kernel0_0",
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
        ]),
        ("other", [
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
            "_rms_norm_forward_kernel", "_swiglu_forward_kernel", "Memcpy HtoD (Pinned -> Device)",
            "aten::copy_", "aten::mul", "aten::native_layer_norm",
        ]),
    ],
)  # fmt: skip
def test_kernels_by_kind(kind, names):
    """Names as cuBLAS, CUTLASS, FlashAttention, cuDNN, fla, Liger and torch give them."""
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)


def test_profiled_times_add_up():
    x = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            (x @ x).add_(x)
    events = found.key_averages()
    ms, count = by_kind(events, on_device=False)
    assert ms["matmul"] > 0
    assert ms["other"] > 0
    assert ms["attention"] == 0
    assert sum(ms.values()) == pytest.approx(sum(event.self_cpu_time_total for event in events) / 1e3)
    assert count >= 6
    assert by_kind(events, on_device=True)[1] == 0


def test_what_was_profiled_stands_beside_the_forecast():
    """Two profiled steps of two micro-batches: the forecast is of a whole step, with one optimizer step."""
    forecast = Step(
        config=tiny_config(tiny_processor(QWEN2_VL), QWEN2_VL),
        family=QWEN2_VL,
        towers=Towers(),
        load=STORY,
        numbers=numbers_of(torch.bfloat16, torch.bfloat16, deepspeed=False),
        card=CARDS["h100"],
    ).quick()
    found = Profiled(ms={"matmul": 1.0, "attention": 2.0, "other": 30.0}, kernels=900, seconds=0.05, peak_gb=None)
    rows = {what: (measured, predicted) for what, measured, predicted in beside(found, [forecast] * 4, micro_batches=2)}
    spent = forecast.whole.kind_seconds
    assert rows["ms of a step in other"] == ("30.0", f"{2e3 * spent['elementwise']:,.1f}")
    assert rows["ms of a step in matmul"] == ("1.0", f"{2e3 * (spent['matmul'] + spent['adapter']):,.1f}")
    one, two = (of_step(forecast, micro_batches=many) for many in (1, 2))
    assert one["ms"] == pytest.approx(1e3 * forecast.seconds)
    assert one["mfu"] == pytest.approx(forecast.mfu)
    assert one["ms"] < two["ms"] <= 2 * one["ms"]
    assert rows["ms of a step, under the profiler"] == ("50.0", f"{two['ms']:,.1f}")
    assert rows["peak memory, GB of tensors"] == ("-", "-")
    unknown = beside(found, [], micro_batches=2)
    assert {predicted for _, _, predicted in unknown} == {"-"}


def test_the_probe_prints_what_the_forecast_assumes():
    probe = Probe(device=torch.device("cpu"), quick=True, card=CARDS["h100"])
    found = [
        one for part in (probe._matmuls, probe._memory, probe._host) for one in part() if isinstance(one, Compared)
    ]
    assumed = {one.what.split(",")[0]: one.assumed for one in found}
    assert assumed == {
        "matmuls of a 2b block": "643.1 TFLOP/s = 0.65 of 989.4",
        "matmul 256": "643.1 TFLOP/s = 0.65 of 989.4",
        **dict.fromkeys(("copy", "sum of two", "cast to float32"), "2.714 TB/s = 0.81 of 3.35"),
        "a kernel with a model's Python code": "10.0 us",
    }
    for one in found:
        assert re.match(r"[\d.e-]+ (TFLOP/s|TB/s|us)", one.measured), one

"""A weight is quantised to the codes of bitsandbytes on a CPU, by operations that are exact on every device."""

from __future__ import annotations

import pytest
import torch

from vlft.model.codes import packed_4bit, packed_int8
from vlft.model.packed import dense, dequantised
from vlft.model.quantise import Quantisation

bnb = pytest.importorskip("bitsandbytes")

KINDS = {"nf4": ("nf4", False), "double": ("nf4", True), "fp4": ("fp4", False), "fp4 double": ("fp4", True)}
SHAPES = [(256, 1024), (96, 96), (7, 33)]  # of whole blocks, of rows that end inside a block, of odd numbers


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02
    weight[0, :16] = 0
    if shape[1] >= 64:
        weight[0, :64] = 0  # a block without a scale
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_4_bit_codes_are_those_of_bitsandbytes(kind, shape, dtype):
    name, double = KINDS[kind]
    weight = weight_of(shape, dtype)
    values, state = packed_4bit(weight, Quantisation(kind=name, double=double))
    want, theirs = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=name)
    assert torch.equal(values, want)
    assert torch.equal(state.absmax, theirs.absmax)
    assert (state.blocksize, state.quant_type, state.shape, state.nested) == (64, name, weight.shape, double)
    if double:
        assert torch.allclose(state.state2.absmax, theirs.state2.absmax, rtol=1e-6)
        assert state.offset == pytest.approx(theirs.offset.item(), rel=1e-6)
    if weight.numel() % 64 == 0:  # else bitsandbytes compiles a function, 40 s
        dense_ones = [bnb.functional.dequantize_4bit(*one) for one in ((values, state), (want, theirs))]
        assert torch.allclose(*dense_ones, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_8_bit_codes_are_those_of_bitsandbytes(shape):
    weight = weight_of(shape)
    places, scales = packed_int8(weight)
    theirs = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    assert torch.equal(places, theirs.data)
    assert torch.equal(scales, theirs.SCB)


def test_a_row_of_zeros_stays_zero():
    weight = torch.zeros(64, 64)
    for how in (Quantisation(kind="int8"), Quantisation(kind="nf4"), Quantisation(kind="fp4", double=True)):
        assert torch.equal(dequantised(weight, how), weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("kind", [*KINDS, "int8"])
def test_codes_on_a_gpu_are_those_on_a_cpu(kind):
    from vlft.model.packed import _packed

    name, double = KINDS.get(kind, ("int8", False))
    how = Quantisation(kind=name, double=double)
    weight = weight_of((512, 1024))
    here, there = _packed(weight, how, "cpu"), _packed(weight, how, "cuda")
    assert torch.equal(here.data, there.data.cpu())
    assert torch.equal(dense(here, torch.float32), dense(there, torch.float32).cpu())

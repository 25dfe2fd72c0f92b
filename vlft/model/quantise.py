"""How the frozen linear layers of a language model are quantised (bitsandbytes).

Embedding, head, merger and vision tower keep their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlft.families import Family

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """A number format of bitsandbytes.

    Attributes:
        kind: nf4 and fp4 have 4 bits a weight and a scale for each 64 weights; int8 has a scale for each output row.
        double: whether the scales of nf4 and fp4 are quantised too.
    """

    kind: Literal["nf4", "fp4", "int8"]
    double: bool = False

    @classmethod
    def of(cls, *, bits: str, quant_type: Literal["nf4", "fp4"], double: bool) -> Quantisation | None:
        """The format of `--bits`, `--quant_type` and `--double_quant`; None for 16 bits."""
        if bits == "16":
            return None
        return cls(kind=quant_type, double=double) if bits == "4" else cls(kind="int8")

    @property
    def bits(self) -> int:
        """Bits of a weight, without its share of the scales."""
        return 8 if self.kind == "int8" else 4


def quantise(model: Any, family: Family, quantisation: Quantisation, *, computing: torch.dtype) -> dict[str, int]:
    """Replace each linear layer of the language model by bitsandbytes' own, in place. Returns tower -> count."""
    import re

    import torch
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    count = 0
    for name, module in list(model.named_modules()):
        if not (isinstance(module, torch.nn.Linear) and re.fullmatch(family.lora_targets["language"], name)):
            continue
        if quantisation.bits == 4:
            new: Any = Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=computing,
                compress_statistics=quantisation.double,
                quant_type=quantisation.kind,
                device="meta",
            )
            new.support_avx512bf16_for_cpu = False
            weight: Any = Params4bit(
                module.weight.data,
                requires_grad=False,
                compress_statistics=quantisation.double,
                quant_type=quantisation.kind,
                module=new,
            )
        else:
            new = Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False, device="meta"
            )
            weight = Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        new.weight = weight.to(module.weight.device)
        new.bias = module.bias
        model.set_submodule(name, new)
        count += 1
    return {"language": count}


def dequantised(weight: torch.Tensor, quantisation: Quantisation, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What a quantised layer multiplies by instead of `weight`, in float32 by default. Computed on the CPU."""
    import torch
    from bitsandbytes import functional

    if quantisation.bits == 8:
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return (codes.float() * (scales / 127)[:, None]).to(dtype or torch.float32)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=quantisation.double, quant_type=quantisation.kind
    )
    state.dtype = dtype or torch.float32
    return functional.dequantize_4bit(packed, state).reshape(weight.shape)


def load_quantised(folder: Any, family: Family, quantisation: Quantisation, dtype: torch.dtype) -> Any:
    """Load a base, quantise its language model, and return it; or load a base whose files are quantised."""
    import json

    import transformers

    from vlft.model.load import load_base

    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        model = getattr(transformers, family.model_class).from_pretrained(folder, dtype=dtype)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model
    model = load_base(folder, family, dtype=dtype)
    quantise(model, family, quantisation, computing=dtype)
    return model

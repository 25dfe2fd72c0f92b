"""Build a tiny Qwen2-VL on disk: the real architecture, a byte-level tokenizer, random weights; no download.

Used by the tests, the demo and anyone who wants to try the tool chain on a laptop:

    python -m vlft.demo.tiny OUT_DIR

The tokenizer knows the 256 bytes and Qwen's own special tokens, so every text and every control token a real
Qwen2-VL sees can be written, at one token a byte.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# What Qwen/Qwen2-VL-*-Instruct render: a default system turn, pictures and videos in place, no newline around them.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """How large a tiny model is; heads of the language model have 16 channels unless said otherwise.

    Attributes:
        vision_depth, vision_width, vision_heads: blocks, channels and heads of the ViT.
        depth, width, inner, heads, kv_heads: of the language model; `inner` are the channels of its MLP.
        rope_theta, rope_sections: of its M-RoPE; the sections sum to half a head.
        std: of the random weights.
    """

    vision_depth: int = 2
    vision_width: int = 32
    vision_heads: int = 2
    depth: int = 2
    width: int = 64
    inner: int = 128
    heads: int = 4
    kv_heads: int = 2
    rope_theta: float = 1000000.0
    rope_sections: tuple[int, int, int] = (2, 3, 3)
    std: float = 0.1  # at transformers' 0.02 so small a model answers much the same to everything


TINY = TinySizes()


def byte_vocabulary() -> dict[str, int]:
    """The 256 byte symbols of GPT-2's byte-level BPE, as ids 0..255 (printable stand-ins for unprintable bytes)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols, spare = {}, 0x100
    for byte in range(256):
        if byte in printable:
            symbols[chr(byte)] = byte
        else:
            symbols[chr(spare)] = byte
            spare += 1
    return symbols


def word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """BPE merges that build each word from its bytes, left to right, so that it becomes one token.

    Args:
        words: ASCII, each with the space before it where it has one (Ġ stands for a space in GPT-2's alphabet).
    """
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        symbols = word.replace(" ", "Ġ")
        for end in range(1, len(symbols)):
            merges[symbols[:end], symbols[end]] = None
    return list(merges)


def tiny_processor(*, min_pixels: int = 4 * 28 * 28, max_pixels: int = 64 * 28 * 28, words: Sequence[str] = ()):
    """A stock `Qwen2VLProcessor` around the byte-level tokenizer.

    Args:
        min_pixels, max_pixels: budget of one picture and of one video frame, in pixels.
        words: that are one token each; all others are one token a byte, or parts of these.
    """
    from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    merges = word_merges(words)
    vocabulary = byte_vocabulary()
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        unk_token=None,  # type: ignore[arg-type]
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(size)),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(processor, *, tied: bool = True, sizes: TinySizes = TINY):
    """A `Qwen2VLConfig`; by default of about 0.3 M parameters: 2 ViT blocks of 32, 2 language layers of 64."""
    from transformers import Qwen2VLConfig

    def token(text: str) -> int:
        return processor.tokenizer.convert_tokens_to_ids(text)

    ends: dict[str, Any] = {"bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>")}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": 64 * math.ceil(len(processor.tokenizer) / 64),
            "hidden_size": sizes.width,
            "intermediate_size": sizes.inner,
            "num_hidden_layers": sizes.depth,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": sizes.rope_theta,
                "mrope_section": list(sizes.rope_sections),
            },
            "pad_token_id": token("<|endoftext|>"),
            **ends,
        },
        vision_config={
            "depth": sizes.vision_depth,
            "embed_dim": sizes.vision_width,
            "hidden_size": sizes.width,
            "num_heads": sizes.vision_heads,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tied,
        **ends,
    )


def build_tiny(
    out: str | Path,
    *,
    seed: int = 0,
    tied: bool = True,
    dtype: Literal["float32", "bfloat16"] = "float32",
    sizes: TinySizes = TINY,
    words: Sequence[str] = (),
) -> Path:
    """Write a tiny base model folder that plain transformers loads.

    Args:
        out: folder to fill.
        seed: of the random weights.
        tied: whether `lm_head` shares the embedding (as in the 2B) or not (as in the 7B).
        dtype: of the stored weights.
        sizes: of the model.
        words: that are one token each.

    Returns:
        `out` as a path.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    processor = tiny_processor(words=words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(tiny_config(processor, tied=tied, sizes=sizes))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=sizes.std)
    model.to(getattr(torch, dtype)).save_pretrained(out)
    processor.save_pretrained(out)
    return Path(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="folder to write")
    print(build_tiny(parser.parse_args().out))

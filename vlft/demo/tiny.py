"""Build a tiny Qwen2-VL on disk: the real architecture, a byte-level tokenizer, random weights; no download.

Used by the tests, the demo and anyone who wants to try the tool chain on a laptop:

    python -m vlft.demo.tiny OUT_DIR

The tokenizer knows the 256 bytes and Qwen's own special tokens, so every text and every control token a real
Qwen2-VL sees can be written, at one token a byte.
"""

from __future__ import annotations

import argparse
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


def tiny_processor(*, min_pixels: int = 4 * 28 * 28, max_pixels: int = 64 * 28 * 28):
    """A stock `Qwen2VLProcessor` around the byte-level tokenizer.

    Args:
        min_pixels, max_pixels: budget of one picture and of one video frame, in pixels.
    """
    from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = Qwen2Tokenizer(
        vocab=byte_vocabulary(),
        merges=[],
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


def tiny_config(processor, *, tied: bool = True):
    """A `Qwen2VLConfig` of about 0.3 M parameters: 2 ViT blocks of 32, 2 language layers of 64."""
    from transformers import Qwen2VLConfig

    def token(text: str) -> int:
        return processor.tokenizer.convert_tokens_to_ids(text)

    ends: dict[str, Any] = {"bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>")}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
            "pad_token_id": token("<|endoftext|>"),
            **ends,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
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
    out: str | Path, *, seed: int = 0, tied: bool = True, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Write a tiny base model folder that plain transformers loads.

    Args:
        out: folder to fill.
        seed: of the random weights.
        tied: whether `lm_head` shares the embedding (as in the 2B) or not (as in the 7B).
        dtype: of the stored weights.

    Returns:
        `out` as a path.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    processor = tiny_processor()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(tiny_config(processor, tied=tied))
        for parameter in model.parameters():  # at 0.02 so small a model answers much the same to everything
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(out)
    processor.save_pretrained(out)
    return Path(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="folder to write")
    print(build_tiny(parser.parse_args().out))

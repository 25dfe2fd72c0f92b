"""Build a tiny model on disk: a family's real architecture, a byte-level tokenizer, random weights; no download.

The tests and the demo use it. To try the tools on a laptop:

    python -m vlft.demo.tiny OUT_DIR

The tokenizer has the 256 bytes and Qwen's special tokens, so it encodes every text and every control token of a real
model of the family, with one token per byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vlft.demo.templates import OF_CHAT
from vlft.families import DEFAULT, Family, Shape
from vlft.model.build import build_config, media_processors

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

#: Tokens of families whose answers may have thoughts. They are ordinary text to the tokenizer, with one id each.
THOUGHT_TOKENS = ("<think>", "</think>")


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
        words: ASCII, each including its leading space if it has one (Ġ is a space in GPT-2's alphabet).
    """
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        symbols = word.replace(" ", "Ġ")
        for end in range(1, len(symbols)):
            merges[symbols[:end], symbols[end]] = None
    return list(merges)


def tiny_processor(
    family: Family = DEFAULT,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    words: Sequence[str] = (),
):
    """A family's stock processor around the byte-level tokenizer.

    Args:
        family: of the model.
        min_pixels: least pixels of one picture and of one video frame; None: 4 tokens.
        max_pixels: most pixels of one picture and of one video frame; None: 64 tokens.
        words: words of one token each; other words have one token per byte, or share parts of these.
    """
    import transformers

    merges = word_merges(words)
    vocabulary = byte_vocabulary()
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = getattr(transformers, family.tokenizer_class)(
        vocab=vocabulary,
        merges=merges,
        unk_token=None,
        bos_token=None,
        eos_token=family.end_of_turn,
        pad_token=family.end_of_text,
        model_max_length=32768,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    if family.chat != "system":
        tokenizer.add_tokens(list(THOUGHT_TOKENS))
    token = family.factor**2
    least, most = 4 * token if min_pixels is None else min_pixels, 64 * token if max_pixels is None else max_pixels
    image, video = media_processors(family, least, most)
    return getattr(transformers, family.processor_class)(
        image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=OF_CHAT[family.chat]
    )


def tiny_config(processor, family: Family = DEFAULT, *, tied: bool | None = None, shape: Shape | None = None):
    """A family's config; by default with its `tiny` shape, which has about 0.3 M parameters."""
    shape = shape or family.tiny
    return build_config(family, shape if tied is None else shape.but(tied=tied), processor.tokenizer)


def build_tiny(
    out: str | Path,
    family: Family = DEFAULT,
    *,
    seed: int = 0,
    tied: bool | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shape: Shape | None = None,
    words: Sequence[str] = (),
) -> Path:
    """Write a tiny base model folder that plain transformers loads.

    Args:
        out: folder to write to.
        family: of the model.
        seed: of the random weights.
        tied: whether the head shares the embedding; None: as in the shape.
        dtype: of the stored weights.
        shape: sizes of the model; None: the family's `tiny`.
        words: words of one token each.

    Returns:
        `out` as a path.
    """
    import torch
    import transformers

    shape = shape or family.tiny
    processor = tiny_processor(family, words=words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.model_class)(tiny_config(processor, family, tied=tied, shape=shape))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=shape.std)
    model.to(getattr(torch, dtype)).save_pretrained(out)
    processor.save_pretrained(out)
    return Path(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="folder to write")
    print(build_tiny(parser.parse_args().out))

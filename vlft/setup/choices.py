"""Chosen blocks and trained tokens of a run: the flags, compared with the base and with the adapter of `--adapter`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from vlft.checkpoint.start import Start
from vlft.config.blocks import OF_TOWER, as_text, places_of, tokens_of
from vlft.config.flags import ModelFlags
from vlft.errors import ConfigError
from vlft.families import Family, Sizes
from vlft.model.towers import Towers


def with_choices(
    towers: Towers,
    model: ModelFlags,
    given: Collection[str],
    *,
    family: Family,
    sizes: Sizes,
    tokenizer: Any,
    start: Start | None,
) -> Towers:
    """The towers of the flags, with their chosen blocks and trained tokens.

    Args:
        towers: without choices.
        model: flags of the model.
        given: names of the flags that the user set.
        family: of the base.
        sizes: of the base.
        tokenizer: of the base.
        start: the adapter that the run starts from; it then decides.

    Raises:
        ConfigError: a block is not there, a token is not one token of the base, the flag has no effect, or the adapter
            has another choice.
    """
    depths = {"vision": sizes.vision.depth, "language": len(sizes.text.layers)}
    chosen: dict[str, Any] = {}
    for flag, tower in OF_TOWER.items():
        text = getattr(model, flag)
        places = None if text is None else places_of(text, depths[tower], flag=flag)
        if towers.modes[tower] == "lora" and places == tuple(range(depths[tower])):
            places = None  # LoRA has nothing outside of blocks
        chosen[flag] = places
    ids = {} if model.train_tokens is None else token_ids(model.train_tokens, family, sizes, tokenizer)
    chosen["tokens"] = tuple(sorted(ids.values()))
    if start is not None:
        if chosen["tokens"] and not start.tokens:
            raise ConfigError(
                f"--train_tokens {model.train_tokens}: the adapter {start.name} trains no tokens. Drop it, or merge "
                f"the adapter first (vlft merge {start.name} OUT), then use --model_id OUT without --adapter."
            )
        texts = {flag: as_text(chosen[flag]) for flag in OF_TOWER}
        texts["train_tokens"] = token_texts(chosen["tokens"], tokenizer)
        found = {flag: start.blocks.get(flag) for flag in OF_TOWER}
        theirs = {flag: as_text(places) for flag, places in found.items()}
        theirs["train_tokens"] = token_texts(start.tokens, tokenizer)
        replace(start, settings=theirs).agree({flag: text for flag, text in texts.items() if flag in given})
        chosen = {**found, "tokens": start.tokens}
    return replace(towers, **chosen)


def token_ids(text: str, family: Family, sizes: Sizes, tokenizer: Any) -> dict[str, int]:
    """Token -> its id.

    Args:
        text: `--train_tokens`.
        family: of the base.
        sizes: of the base.
        tokenizer: of the base.

    Raises:
        ConfigError: a text is not one token, has no row in the embedding, or its row is never used.
    """
    found: dict[str, int] = {}
    split = []
    for token in tokens_of(text):
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            pieces = [_decoded(tokenizer, [one]) for one in ids]
            split.append(f"{token} is {len(ids)} tokens ({' '.join(map(repr, pieces))})")
        elif token in (family.image_pad, family.video_pad):
            raise ConfigError(
                f"--train_tokens {token}: its row of the embedding is never used, because features of pictures take "
                "its places. Drop it."
            )
        elif ids[0] >= sizes.text.vocab:
            raise ConfigError(
                f"--train_tokens {token}: its id is {ids[0]}, but the embedding of the base has {sizes.text.vocab:,} "
                f"rows. Resize the base first. {_HOW_TO_ADD}"
            )
        elif ids[0] in found.values():
            other = next(one for one, its in found.items() if its == ids[0])
            raise ConfigError(f"--train_tokens: {token} and {other} are the same token. Name it once.")
        else:
            found[token] = ids[0]
    if split:
        raise ConfigError(f"--train_tokens: {'; '.join(split)} in the tokenizer of the base. {_HOW_TO_ADD}")
    return found


_HOW_TO_ADD = (
    "To add tokens, save a base that has them with transformers, and use it as --model_id: "
    "processor.tokenizer.add_tokens(['<a>']), model.resize_token_embeddings(len(processor.tokenizer)) if the embedding "
    "has fewer rows, then save_pretrained of both into one folder."
)


def token_texts(ids: Collection[int], tokenizer: Any) -> str:
    """Tokens as `--train_tokens` spells them."""
    return ",".join(_decoded(tokenizer, [one]) for one in ids)


def trained_tokens(towers: Towers, tokenizer: Any) -> dict[str, int]:
    """Token -> id, for the tokens whose rows train, in the order of ids."""
    return {_decoded(tokenizer, [one]): one for one in towers.tokens}


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

"""Log-probabilities of given endings of prompts, by the model's stock forward. Opens no file.

A prompt with its pictures is computed once. Its cache is then copied for each ending, also that of recurrent layers.
`vlft.scoring` turns conversations and labels into prompts and endings.

Letters in shapes: B prompts, E endings, N pairs of a prompt and an ending in one forward, T tokens of the longest
prompt, L tokens of the longest ending, V words of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from vlft.model.generate import Prompt, Speaker


def endings_logprobs(
    speaker: Speaker,
    prompts: Sequence[Prompt],
    endings: Sequence[Sequence[int]],
    *,
    together: int,
) -> torch.Tensor:
    """Sum the log-probabilities of the tokens of each ending after each prompt.

    They are those of one stock forward over prompt and ending, up to rounding.

    Args:
        speaker: the model.
        prompts: computed together, padded on the left.
        endings: token ids; each ending has at least one.
        together: most pairs of a prompt and an ending in one forward. Each holds a copy of its prompt's cache.

    Returns:
        float64 [B, E], on the CPU.

    Raises:
        ValueError: an ending has no tokens.
    """
    if not all(endings):
        raise ValueError("an ending has no tokens")
    inputs = speaker.inputs(prompts)
    mask_BT = inputs["attention_mask"]
    with torch.inference_mode():
        positions_3BT = _positions(speaker.model, inputs)
        out = speaker.model(**inputs, position_ids=positions_3BT, use_cache=True, logits_to_keep=1)
        first_BV = out.logits[:, -1].float().log_softmax(-1)
        firsts = torch.tensor([ending[0] for ending in endings], device=first_BV.device)
        found_BE = first_BV[:, firsts].double()
        # A position after a prompt counts on from its largest one, in time, height and width alike.
        next_B = positions_3BT.masked_fill(mask_BT == 0, -1).amax(dim=(0, 2)) + 1
        longer = [place for place, ending in enumerate(endings) if len(ending) > 1]
        pairs = [(row, place) for row in range(len(prompts)) for place in longer]
        for start in range(0, len(pairs), together):
            some = pairs[start : start + together]
            rows_N = torch.tensor([row for row, _ in some], device=mask_BT.device)
            places_N = torch.tensor([place for _, place in some], device=mask_BT.device)
            found_BE[rows_N, places_N] += _rest(
                speaker,
                _copied(out.past_key_values, rows_N),
                mask_BT[rows_N],
                next_B[rows_N],
                [endings[place] for _, place in some],
            )
    return found_BE.cpu()


def _positions(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Positions of padded prompts as transformers' `generate` computes them: int64 [3, B, T]."""
    if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
        return model.model.get_rope_index(**inputs)[0]
    text_BT = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return text_BT.expand(3, -1, -1)


def _copied(cache: Any, rows_N: torch.Tensor) -> Any:
    """A cache of the prompts with these numbers, in this order and as often as they occur. The given one is unchanged.

    `reorder_cache` is what transformers' beam search uses, so that each kind of layer has it (5.17 to 5.23). It
    replaces tensors but writes into the layer's lists and dicts.
    """
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        own = vars(layer)
        own.update({name: copy.copy(value) for name, value in own.items() if isinstance(value, (dict, list))})
    made.reorder_cache(rows_N)
    return made


def _rest(
    speaker: Speaker,
    cache: Any,
    mask_NT: torch.Tensor,
    next_N: torch.Tensor,
    endings: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Sum the log-probabilities of the tokens of each ending after its first one: float64 [N].

    Endings are padded on the right, where no earlier token sees the padding.

    Args:
        cache: of the prompts; it is changed.
        mask_NT: 0 at the padding of the prompts.
        next_N: position of the token after each prompt.
    """
    longest = max(map(len, endings)) - 1
    device = mask_NT.device
    ids_NL = torch.full((len(endings), longest), speaker.pad, device=device)
    targets_NL = torch.zeros_like(ids_NL)
    known_NL = torch.zeros_like(ids_NL, dtype=torch.bool)
    for row, ending in enumerate(endings):
        ids = torch.tensor(ending, device=device)
        ids_NL[row, : len(ids) - 1], targets_NL[row, : len(ids) - 1] = ids[:-1], ids[1:]
        known_NL[row, : len(ids) - 1] = True
    mask = torch.cat([mask_NT, torch.ones_like(ids_NL)], dim=1)
    positions_NL = next_N[:, None] + torch.arange(longest, device=device)
    logits_NLV = speaker.model(
        input_ids=ids_NL,
        attention_mask=mask,
        position_ids=positions_NL.expand(3, -1, -1),
        past_key_values=cache,
        use_cache=True,
    ).logits
    said_NL = logits_NLV.float().log_softmax(-1).gather(-1, targets_NL[..., None]).squeeze(-1).double()
    return said_NL.masked_fill(~known_NL, 0.0).sum(-1)

"""The memory of the completions of a GRPO step: TRL samples those of the whole step at once, before it trains on them.

Letters: N completions that one process samples, T tokens of a prompt and its completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlft.data.order import RowOrder
from vlft.data.sample import Cost
from vlft.families.sizes import Sizes
from vlft.model.tracing import Load

FLOAT, INTEGER = 4, 8  # bytes
TOKEN_TENSORS = 5  # of a step: ids and mask of prompts and completions, and the kinds of tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What one process samples in a step.

    Attributes:
        completions: N; all at once.
        prompt: tokens of the longest prompt; shorter ones are padded.
        completion: `--max_completion_length`.
        patches: most patches of a prompt. Each completion has a copy of them.
        micro_batch: completions that are trained at once.
        each: completions of a prompt.
    """

    completions: int
    prompt: int
    completion: int
    patches: int
    micro_batch: int
    each: int

    @property
    def length(self) -> int:
        return self.prompt + self.completion

    @property
    def load(self) -> Load:
        """The shapes of a micro-batch."""
        return Load(
            lengths=(self.length,) * self.micro_batch,
            vision_lengths=(self.patches,) * self.micro_batch if self.patches else (),
            supervised=self.micro_batch * self.completion,
        )

    def held(self, sizes: Sizes) -> int:
        """Bytes of tokens and pixels, which stay on the card until the step ends."""
        vision = sizes.vision
        of_patch = vision.channels * vision.temporal * vision.patch**2 * FLOAT
        return self.completions * (self.patches * of_patch + TOKEN_TENSORS * self.length * INTEGER)

    def cache(self, sizes: Sizes, itemsize: int) -> int:
        """Bytes of the keys and values of all completions at their full length, and of recurrent states."""
        return self.completions * cache_bytes(sizes, self.length, itemsize)

    def scores(self, sizes: Sizes, itemsize: int) -> int:
        """Bytes of the logits of the next tokens, and of their float32 copies: at the temperature, and as shares."""
        return self.completions * sizes.text.vocab * (itemsize + 3 * FLOAT)

    def sampled(self, sizes: Sizes, itemsize: int, *, block: int) -> int:
        """Bytes that sampling needs besides weights and optimizer.

        Args:
            sizes: of the model.
            itemsize: bytes of a key or value.
            block: bytes of one block at work on a micro-batch.
        """
        cache = self.cache(sizes, itemsize)
        grown = cache // len(sizes.text.layers)  # a layer's cache is copied when it grows
        prompts = block * self.completions * self.prompt // (self.micro_batch * self.length)
        return cache + max(prompts, grown + self.scores(sizes, itemsize))


def cache_bytes(sizes: Sizes, tokens: int, itemsize: int) -> int:
    """Bytes of the cache of `generate` for one conversation of so many tokens.

    A layer with softmax attention keeps a key and a value of each token. A gated delta net keeps its last inputs, and a
    float32 state of fixed size.
    """
    text, found = sizes.text, 0
    for layer in text.layers:
        if (delta := layer.recurrent) is None:
            found += 2 * text.kv_heads * text.head_dim * tokens * itemsize
        else:
            found += (2 * delta.keys + delta.values) * delta.taps * itemsize
            found += delta.value_heads * delta.key_dim * delta.value_dim * FLOAT
    return found


def sampling_of(order: RowOrder, costs: Sequence[Cost], *, completion: int, micro_batch: int) -> Sampling:
    """What a process samples in a step of `--method grpo`.

    Args:
        order: of the prompts.
        costs: of the prompts.
        completion: `--max_completion_length`.
        micro_batch: `--per_device_train_batch_size`.
    """
    each = order.group or 1
    return Sampling(
        completions=-(-order.rows_per_step * each // order.world),
        prompt=max(cost.tokens for cost in costs),
        completion=completion,
        patches=max(cost.patches for cost in costs),
        micro_batch=micro_batch,
        each=each,
    )

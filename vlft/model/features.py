"""The features of pictures: what the vision tower returns, and how stored and repeated ones are added to it.

`vlft.model.adapt` makes them, and `vlft.model.forward` puts them into the row.

Letters: N merged patches, H channels of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Features:
    """The result of the vision tower for a batch.

    Attributes:
        embeds_NH: features that replace the embeddings of pad tokens.
        layers_NH: with `deepstack`, one tensor for each of the first language layers, added to the layer's output.
    """

    embeds_NH: torch.Tensor
    layers_NH: tuple[torch.Tensor, ...] = ()

    def first(self, count: int) -> Features:
        """The features of the first merged patches. With `count` 0, every merger still gets a gradient of zeros."""
        return Features(
            embeds_NH=self.embeds_NH[:count], layers_NH=tuple(features[:count] for features in self.layers_NH)
        )

    @property
    def stack_LNH(self) -> torch.Tensor:
        """All tensors as one, as the cache of features stores them: `embeds_NH`, then each of `layers_NH`."""
        return torch.stack([self.embeds_NH, *self.layers_NH]) if self.layers_NH else self.embeds_NH[None]

    @classmethod
    def stacked(cls, stack_LNH: torch.Tensor) -> Features:
        """The features that have this `stack_LNH`."""
        embeds_NH, *layers_NH = stack_LNH.unbind()
        return cls(embeds_NH=embeds_NH, layers_NH=tuple(layers_NH))

    def at(self, places: torch.Tensor) -> Features:
        """The features at these places, int64; a place may appear several times."""
        embeds_NH, *layers_NH = (x.index_select(0, places) for x in (self.embeds_NH, *self.layers_NH))
        return Features(embeds_NH=embeds_NH, layers_NH=tuple(layers_NH))

    def and_then(self, others: Features) -> Features:
        """These features, followed by others."""
        if not len(self.embeds_NH):
            return others
        pairs = zip((self.embeds_NH, *self.layers_NH), (others.embeds_NH, *others.layers_NH), strict=True)
        embeds_NH, *layers_NH = (torch.cat(pair) for pair in pairs)
        return Features(embeds_NH=embeds_NH, layers_NH=tuple(layers_NH))

"""Measure whether merged weights answer like base + adapter, with plain transformers and peft, in float32 on the CPU.

One model is in memory at a time. Letters: T compared positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoint import Adapter, attach_adapter
from vlft.families import Family
from vlft.model.load import load_base, load_processor

if TYPE_CHECKING:
    import torch

    from vlft.merge.quantised import QuantisedBase

# Promise 7 of the design: allowed share of the logits' range without rounding, and of the adapter's effect with it.
EXACT_SHARE = 1e-4
MOVED_SHARE = 0.02

# Only the last positions: with 152k tokens a position's logits are 0.6 MB, and a picture may have 1,000 positions.
POSITIONS = 64

_TEXT = "Name the planets from the sun outwards, then say in one sentence which of them has the most moons."
_ANSWER = "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune. Saturn has the most moons known today."
_QUESTION = "What colours are in this picture, and where?"
_SEEN = "The upper left is dark, the lower right is bright, and red and green stripes cross it."


@dataclass(frozen=True, kw_only=True)
class RowCheck:
    """One row's figures: largest absolute differences of two T x V float32 logits, and a count.

    Attributes:
        row: `text` or `picture`.
        difference: merged against base + adapter: the whole error of merging, including rounding.
        fault: merged against peft's own merge of the loaded models, rounded once as the files are. This is the error
            without rounding. Equal to `difference` if nothing was rounded.
        moved: base + adapter against the base: the effect of the adapter on this row.
        range: largest minus smallest logit of base + adapter.
        flips: number of positions where the merged model prefers another token, without ties.
        drift: merged against what was trained, the quantised base + adapter. None if the base was not quantised.
        layers: quantised layers against their dequantised weights, both with the adapter; None if the merge does not
            use these weights.
        coarse: dequantised weights against themselves rounded as the files are, both with the adapter. `difference`
            does not include it. None likewise, or if nothing was rounded.
    """

    row: str
    difference: float
    fault: float
    moved: float
    range: float
    flips: int
    drift: float | None = None
    layers: float | None = None
    coarse: float | None = None

    @property
    def faultless(self) -> bool:
        """Whether the arithmetic is right: `fault` is within 1e-4 of the logits' range."""
        return self.fault <= EXACT_SHARE * self.range

    @property
    def same_weights(self) -> bool:
        """Whether quantised layers multiply by the dequantised weights: `layers`, within the same share."""
        return self.layers is None or self.layers <= EXACT_SHARE * self.range

    @property
    def fine_enough(self) -> bool:
        """Whether the files' dtype holds the values of a dequantised base: `coarse`, with the tolerance of rounding."""
        return self.coarse is None or self.coarse <= self.allowed

    @property
    def allowed(self) -> float:
        """The allowed rounding error: 2% of the adapter's effect, but at least the noise of float32."""
        return max(EXACT_SHARE * self.range, MOVED_SHARE * self.moved)

    @property
    def kept(self) -> bool:
        """Whether the effect of the adapter survived the rounding."""
        return self.difference <= self.allowed and self.flips == 0


def flips_of(adapted_TV: torch.Tensor, merged_TV: torch.Tensor, rounded_to: torch.dtype | None) -> int:
    """The number of positions with another top token, without ties.

    A tie: the logits of the two tokens in base + adapter are closer than the dtype of the files can represent at that
    magnitude (one unit in the last place of the position's largest logit). The arithmetic of the serving program then
    decides which token is on top.

    Args:
        adapted_TV: float32 logits of base + adapter.
        merged_TV: float32 logits of the merged model.
        rounded_to: dtype to which changed tensors were rounded; None for float32.
    """
    import torch

    top_T, chosen_T = adapted_TV.argmax(-1), merged_TV.argmax(-1)
    gap_T = (adapted_TV.gather(-1, top_T[:, None]) - adapted_TV.gather(-1, chosen_T[:, None])).squeeze(-1)
    share = EXACT_SHARE if rounded_to is None else torch.finfo(rounded_to).eps
    return int((gap_T > share * adapted_TV.abs().amax(-1)).sum())


def verify(
    *,
    base: Path,
    adapter: Adapter,
    merged: Path,
    family: Family,
    untied: bool,
    stored_as: Mapping[str, torch.dtype],
    rounded_to: torch.dtype | None,
    progress: Callable[[str], None],
    trained: QuantisedBase | None = None,
    dequantised: bool = False,
) -> list[RowCheck]:
    """Run a text row and a picture row through base, base + adapter, peft's own merge, and the merged files.

    Args:
        base: folder of the base.
        adapter: as read for the base.
        merged: folder of the merged model, with the processor.
        family: of the base.
        untied: whether the merge unties the head from the embedding.
        stored_as: published tensor name -> dtype in `merged`, for every tensor that was rounded.
        rounded_to: the coarsest of these dtypes; None if no tensor was rounded.
        progress: called with a line of text from time to time.
        trained: the base as it was quantised in training; None: it was not.
        dequantised: whether the files hold its dequantised weights; then they are the base of the comparison too.

    Returns:
        One check per row; the caller decides whether they pass.

    Raises:
        CheckpointError: a model, the adapter or the processor does not load completely.
    """
    rows = _rows(merged, family)
    answered: dict[str, torch.Tensor] = {}
    if trained is not None:
        answered = _quantised_TV(trained, adapter, rows, untied=untied, progress=progress)
    progress("verify: base and base + adapter in float32")
    model = _load(base, family)
    if trained is not None and dequantised:
        trained.dequantise(model)
    held = _held(model, stored_as, trained) if trained is not None and dequantised else {}
    alone = {name: _logits_TV(model, row) for name, row in rows.items()}
    adapted_model = attach_adapter(model, adapter, family, untied=untied)
    exact = {name: _logits_TV(adapted_model, row) for name, row in rows.items()}
    with _rounded(adapted_model, held):
        adapted = {name: _logits_TV(adapted_model, row) for name, row in rows.items()} if held else exact
    wanted = adapted
    if stored_as:
        model = adapted_model.merge_and_unload()
        for name, parameter in model.named_parameters():
            kind = stored_as.get(family.published_name(name))
            if kind is not None:
                parameter.data.copy_(parameter.data.to(kind))
        wanted = {name: _logits_TV(model, row) for name, row in rows.items()}
        del model
    del adapted_model
    progress("verify: merged in float32")
    whole = _load(merged, family)
    checks = []
    for name, row in rows.items():
        found_TV = _logits_TV(whole, row)
        checks.append(
            RowCheck(
                row=name,
                difference=_largest(found_TV, adapted[name]),
                fault=_largest(found_TV, wanted[name]),
                moved=_largest(adapted[name], alone[name]),
                range=(adapted[name].max() - adapted[name].min()).item(),
                flips=flips_of(adapted[name], found_TV, rounded_to),
                drift=_largest(found_TV, answered[name]) if answered else None,
                layers=_largest(exact[name], answered[name]) if answered and dequantised else None,
                coarse=_largest(exact[name], adapted[name]) if held else None,
            )
        )
    return checks


def _held(
    model: torch.nn.Module, stored_as: Mapping[str, torch.dtype], trained: QuantisedBase
) -> dict[torch.Tensor, torch.dtype]:
    """Parameters with dequantised values -> the dtype that the files round them to."""
    family = trained.family
    names = {name: family.published_name(name) for name, _ in model.named_parameters()}
    return {
        parameter: stored_as[names[name]]
        for name, parameter in model.named_parameters()
        if names[name] in trained.names and names[name] in stored_as
    }


@contextlib.contextmanager
def _rounded(model: torch.nn.Module, held: Mapping[torch.Tensor, torch.dtype]) -> Iterator[None]:
    """Within this context the layers of some parameters compute with rounded values, one layer at a time."""

    def swap(module: torch.nn.Module, *_: Any) -> None:
        weight = _own(module)
        values.append(weight.data)
        weight.data = weight.data.to(held[weight]).float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        _own(module).data = values.pop()

    values: list[torch.Tensor] = []
    inner = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
    layers = [module for module in model.modules() if id(module) not in inner and _own(module) in held]
    hooks = [layer.register_forward_pre_hook(swap) for layer in layers]
    hooks += [layer.register_forward_hook(restore) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _own(module: torch.nn.Module) -> Any:
    """The weight of a linear layer, also of one with an adapter."""
    return getattr(getattr(module, "base_layer", module), "weight", None)


def _quantised_TV(
    trained: QuantisedBase,
    adapter: Adapter,
    rows: Mapping[str, dict[str, Any]],
    *,
    untied: bool,
    progress: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """Logits of each row by what was trained: the quantised base, computing in float32, and the adapter."""
    progress("verify: quantised base + adapter, computing in float32")
    model = trained.adapted(adapter, untied=untied)
    return {name: _logits_TV(model, row) for name, row in rows.items()}


def _largest(one_TV: torch.Tensor, other_TV: torch.Tensor) -> float:
    return (one_TV - other_TV).abs().max().item()


def picture_HWC():
    """A fixed picture of 168 x 224 pixels: a brightness ramp crossed by coloured stripes."""
    import numpy as np

    y_HW, x_HW = np.mgrid[0:168, 0:224]
    ramp_HW = (x_HW + y_HW) * 255 // (168 + 224 - 2)
    return np.stack([ramp_HW, (x_HW * 3) % 256, (y_HW * 5 + ramp_HW) % 256], axis=-1).astype(np.uint8)


def _rows(folder: Path, family: Family) -> dict[str, dict[str, Any]]:
    """Model inputs of the two rows, from the processor of the merged folder."""
    from PIL import Image

    processor = load_processor(folder)

    def turns(question: str, answer: str) -> str:
        start, end = family.start_of_turn, family.end_of_turn
        return f"{start}user\n{question}{end}\n{start}assistant\n{answer}{end}\n"

    seen = f"{family.vision_start}{family.image_pad}{family.vision_end}{_QUESTION}"
    return {
        "text": dict(processor(text=[turns(_TEXT, _ANSWER)], return_tensors="pt")),
        "picture": dict(
            processor(text=[turns(seen, _SEEN)], images=[Image.fromarray(picture_HWC())], return_tensors="pt")
        ),
    }


def _load(folder: Path, family: Family) -> torch.nn.Module:
    """The stock model in float32, on the CPU: a run may hold the GPU, and TF32 would blur what is measured."""
    import torch

    return load_base(folder, family, dtype=torch.float32).eval()


def _logits_TV(model, row: dict[str, Any]) -> torch.Tensor:
    """Float32 logits of the row's last positions, [min(T, POSITIONS), V]."""
    import torch

    with torch.inference_mode():
        return model(**row, use_cache=False, logits_to_keep=POSITIONS).logits[0].float()

"""Open the result of a run, or any Qwen-VL, to answer with it: first its settings, then its weights. Prints nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlft.answering import seconds_remark, speaker
from vlft.checkpoint import (
    Adapter,
    RunRecord,
    attach_adapter,
    check_lineage,
    computing_dtype_of,
    find_adapter_or_model,
    find_base,
    open_processor,
    quantisation_to_answer,
    read_adapter,
    resolve_complete,
)
from vlft.config.device import has_bf16
from vlft.config.recipe import Recipe
from vlft.config.row_flags import BoxFormat
from vlft.config.thinking import ENABLE, Thinking, thinking_of_run
from vlft.data.encode import Encoder
from vlft.errors import ConfigError
from vlft.families import Family, Sizes
from vlft.model import lora
from vlft.model.generate import Speaker
from vlft.model.load import load_base, load_config
from vlft.model.packed import computing_in, load_quantised
from vlft.model.quantise import Quantisation


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model with the settings of its training. Its weights are not loaded.

    Attributes:
        name: a description of what was opened.
        folder: of the base, or of the whole model.
        adapter: read from its files; None for a whole model.
        quantisation: of the base's linear layers, as in training; None: they keep the dtype of the files.
        computing: the dtype to which training rounded dense weights of quantised layers, such as `bfloat16`.
        encoder: conversations -> tokens and pixels, with the run's settings.
        limit: most tokens of prompt and answer together that the model supports.
        notes: for the user, about how it was read.
    """

    name: str
    folder: Path
    adapter: Adapter | None
    quantisation: Quantisation | None
    computing: str
    encoder: Encoder
    limit: int
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """The family of the model."""
        return self.encoder.family

    def load(self, device: torch.device | str | None = None) -> Loaded:
        """Load the weights, in bf16 on a GPU that has it and in float32 elsewhere.

        Args:
            device: where to run the model; None: the GPU if there is one.

        Raises:
            CheckpointError: weights are missing, unexpected or of another shape.
            ConfigError: there is not enough memory.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        half = device.type == "cuda" and has_bf16()
        dtype = torch.bfloat16 if half else torch.float32
        with enough_memory(device):
            if self.quantisation is None:
                model: Any = load_base(self.folder, self.family, dtype=dtype)
            else:
                model = load_quantised(self.folder, self.family, self.quantisation, dtype)
            if self.adapter is not None:
                model = attach_adapter(model, self.adapter, self.family).get_base_model()
                if self.adapter.magnitudes():
                    lora.bind(model)  # DoRA as in training, not as PEFT computes it
            for parameter in model.parameters():  # not model.to(dtype), which would round M-RoPE's frequencies too
                if parameter.is_floating_point():  # bitsandbytes moves its own with the model
                    parameter.data = parameter.data.to(device, dtype)
            model.to(device).eval()
            if (rounded_to := getattr(torch, self.computing)) is not torch.float32:
                computing_in(model, rounded_to)  # after the move, which makes new weights
        remark = seconds_remark(model, self.encoder.recipe)
        return Loaded(
            name=f"{self.name}, {str(dtype).removeprefix('torch.')} on {device}",
            speaker=speaker(model, self.encoder.processor, self.family),
            notes=(remark,) if remark else (),
        )


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The weights of a model.

    Attributes:
        name: `Opened.name`, with the dtype and the device.
        speaker: generates answers.
        notes: for the user, about the loaded model.
    """

    name: str
    speaker: Speaker
    notes: tuple[str, ...] = ()


def open_settings(
    path: str | Path,
    *,
    base_model: str | None = None,
    thinking: Thinking = "auto",
    box_format: BoxFormat | None = "as_is",
) -> Opened:
    """Open a model to answer with. No weights are loaded, except those of an adapter.

    Args:
        path: run folder, `checkpoint-N`, adapter, merged or base model, or the hub id of a complete model.
        base_model: folder or hub id of an adapter's base, if it is not the one that the run names.
        thinking: whether the model thinks before its answers. auto: as it was trained, else as its chat template
            decides.
        box_format: unit of the boxes in conversations; None: that of the run's rows, `as_is` without a run.

    Raises:
        CheckpointError: nothing is found, it is incomplete or not a Qwen-VL, the adapter belongs to another base, or
            its base was quantised and bitsandbytes is not installed.
        ConfigError: `base_model` is set for a model that needs none, or its chat template takes no `thinking`.
    """
    found = find_adapter_or_model(path) if Path(path).expanduser().is_dir() else None
    if found is not None and found.kind == "adapter":
        base_id, folder = find_base(path, found, base_model)
        check_lineage(path, found, base_id, folder)
        name = f"{path} (adapter on {base_id})"
    else:
        name, folder = str(path), resolve_complete(path, base_model)
    record = found.record if found else None
    quantisation = quantisation_to_answer(path, record, folder)
    if quantisation is not None:
        name += f", quantised to {quantisation.kind} as in training"
    config, family = load_config(folder)
    adapter = read_adapter(found.folder, folder, family) if found is not None and found.kind == "adapter" else None
    processor = open_processor(folder, adapter.folder if adapter else None)
    sizes = family.sizes(config)
    recipe = _recipe(record, processor, family, sizes, thinking=thinking, box_format=box_format)
    notes = adapter.notes if adapter is not None else ()
    if record is not None and thinking == "auto" and ENABLE in recipe.switches and recipe.thinking == "auto":
        notes = (*notes, "it was trained with and without thoughts, and its chat template decides; --thinking chooses")
    return Opened(
        name=name,
        folder=folder,
        adapter=adapter,
        quantisation=quantisation,
        computing=computing_dtype_of(path, record),
        encoder=Encoder(family=family, processor=processor, recipe=recipe),
        limit=sizes.text.max_positions,
        notes=notes,
    )


def _recipe(
    record: RunRecord | None,
    processor: Any,
    family: Family,
    sizes: Sizes,
    *,
    thinking: Thinking,
    box_format: BoxFormat | None,
) -> Recipe:
    """The run's recipe without the settings that apply only to training; without a run, that of the processor.

    Raises:
        ConfigError: the chat template takes no `thinking`.
    """
    model: dict[str, Any] = {"family": family, "tokens_per_second": sizes.vision.tokens_per_second}
    recipe = Recipe.of(processor, **model) if record is None else Recipe.of_run(processor, record.settings, **model)
    if thinking != "auto" and ENABLE not in recipe.switches:
        raise ConfigError(
            f"--thinking {thinking}: the chat template of this model does not take {ENABLE}, so the flag has no "
            "effect. Drop it."
        )
    if thinking == "auto" and record is not None:
        trained = thinking_of_run(record.settings)
        thinking = "auto" if trained is None else "on" if trained else "off"
    # Lengths are checked with the answer, by `vlft.answering`.
    recipe = replace(recipe, thinking=thinking, max_length=sys.maxsize, fit=None)
    return recipe if box_format is None else replace(recipe, box_format=box_format)


@contextlib.contextmanager
def enough_memory(device: torch.device) -> Iterator[None]:
    """A context that turns an error of a GPU's memory into one that says what to do.

    Raises:
        ConfigError: instead of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        raise ConfigError(
            f"not enough memory on {device} ({free:.1f} GiB free). Use fewer media, free the GPU, or hide it: "
            "CUDA_VISIBLE_DEVICES= vlft ..."
        ) from error

"""Load a base whose files are quantised: its layers are found by their tensors, and not by config.json.

config.json lists the layers that were skipped by their names in the version of transformers that wrote it. Published
bases skip `visual` or `merger`, which are prefixes of no module of transformers 5: it would expect packed weights in
the vision tower, where the files have plain ones, and would leave layers that cannot compute.

Neighbours: `vlft.model.quantised_files` reads the tensors, `vlft.model.load` calls it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vlft.errors import CheckpointError
from vlft.families import Family
from vlft.model.quantised_files import QuantisedFiles
from vlft.text import error_text


@contextlib.contextmanager
def without_packed() -> Iterator[None]:
    """Within this context transformers loads all weights that are not packed.

    It neither warns of the packed ones, nor fills them with random numbers.
    """
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_init_weights():
            yield
    finally:
        logging.set_verbosity(before)


def install(model: torch.nn.Module, folder: Path, family: Family, info: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Put the quantised layers of a folder into a model that was loaded without them, in place.

    Args:
        model: top class of the family, with linear layers in their place.
        folder: of the base.
        family: of the base.
        info: transformers' report of the keys that did not fit.

    Returns:
        the report without the keys of quantised layers.

    Raises:
        CheckpointError: a quantised tensor is no weight of a linear layer, or its scales cannot be read.
    """
    files = QuantisedFiles.of(folder, family)
    names = {family.published_name(name): name for name, _ in model.named_parameters()}
    packed = set()
    for published in files.states:
        name = names.get(published, published)
        module, _, leaf = name.rpartition(".")
        linear = model.get_submodule(module) if published in names else None
        if type(linear) is not torch.nn.Linear or leaf != "weight":
            raise CheckpointError(
                f"{folder}: {published} is quantised, and is not the weight of a linear layer of {family.model_class}. "
                "Use the model of 16 bits."
            )
        try:
            values, state = files.parts(published)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: the scales of {published} cannot be read ({error_text(error)}). Download the model again."
            ) from error
        parent, _, key = module.rpartition(".")
        setattr(model.get_submodule(parent), key, _layer(linear, values, state))
        packed.add(name)
    return {kind: [key for key in keys if _weight_of(key) not in packed] for kind, keys in info.items()}


def _layer(linear: torch.nn.Linear, values: torch.Tensor, state: Any) -> torch.nn.Module:
    """bitsandbytes' layer with packed values in place of a linear layer."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    how = {"compress_statistics": state.nested, "quant_type": state.quant_type, "quant_storage": values.dtype}
    with torch.device("meta"):  # the weight that it makes is replaced
        made = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=state.dtype, **how)
    made.weight = Params4bit(
        values,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        bnb_quantized=True,
        module=made,
        **how,
    )
    made.quant_state = state
    made.bias = linear.bias
    return made.train(linear.training)


def _weight_of(key: Any) -> str:
    """The weight to which a key of transformers' report belongs; mismatched keys have shapes beside them."""
    name = str(key[0] if isinstance(key, tuple) else key)
    head, middle, rest = name.partition(".weight")
    return head + middle if middle and (not rest or rest.startswith(".")) else name

"""Open a base: its config, processor and weights, always with safetensors and without remote code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from vlft.errors import CheckpointError
from vlft.families import DEFAULT, Family
from vlft.families.stored import match
from vlft.model.proof import prove
from vlft.model.quantised_files import is_stored_quantised, stored_shapes
from vlft.model_files import read_json
from vlft.text import error_text

if TYPE_CHECKING:
    import torch

    from vlft.config.training import TrainFlags


def load_config(folder: str | Path) -> tuple[Any, Family]:
    """The base's config and family.

    Raises:
        CheckpointError: `config.json` is missing, unreadable, of an unsupported model type, or has values that
            transformers does not accept.
    """
    from transformers import AutoConfig, GenerationConfig

    path = Path(folder) / "config.json"
    family = Family.of(read_json(path).get("model_type"), where=str(folder))
    try:
        if (path.parent / "generation_config.json").is_file():
            path = path.parent / "generation_config.json"
            GenerationConfig.from_pretrained(folder)
            path = path.parent / "config.json"
        return AutoConfig.from_pretrained(folder), family
    except Exception as error:  # transformers validates fields with exceptions of several packages (5.23)
        raise CheckpointError(
            f"{path}: transformers does not accept it ({error_text(error)}). Download it again."
        ) from error


def load_processor(folder: str | Path, *, where: str | Path | None = None) -> Any:
    """The stock processor of a model folder, checked against the model of its config.json (`vlft.model.proof`).

    Args:
        folder: with config.json.
        where: the name of the folder in messages; None: `folder`.

    Raises:
        CheckpointError: processor files are missing or broken, or the processor does not fit the model.
    """
    import transformers

    where = where or folder
    config, family = load_config(folder)
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exception for a file it cannot read
        raise CheckpointError(
            f"{where}: its processor cannot be loaded ({error_text(error)}). It needs tokenizer.json, "
            "preprocessor_config.json (or processor_config.json) and a chat template next to the weights."
        ) from error
    if type(processor.tokenizer).__name__ == DEFAULT.tokenizer_class != family.tokenizer_class:
        # The files of Qwen3.5 name the class of Qwen2, which splits words at combining marks. transformers 5.23 takes
        # the class of the model type instead, 5.17 does not.
        processor.tokenizer = getattr(transformers, family.tokenizer_class).from_pretrained(folder)
    prove(processor, config, family, where=where)
    return processor


def load_base(folder: str | Path, family: Family, *, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The base model, on the CPU, with sdpa attention.

    Args:
        folder: model folder.
        family: of its config.
        dtype: of the loaded weights; None: that of the files.

    Raises:
        CheckpointError: weights are missing, unexpected, of a different shape, or not safetensors.
    """
    import transformers

    check_fit(folder, family)
    stored = is_stored_quantised(Path(folder))
    loading: Any = contextlib.nullcontext()
    plain: dict[str, Any] = {}
    if stored:
        from vlft.model import stored_layers

        config, _ = load_config(folder)
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            vars(part).pop("quantization_config", None)  # transformers would choose the layers by it
        loading, plain = stored_layers.without_packed(), {"config": config}
    model_class = getattr(transformers, family.model_class)
    try:
        with loading:
            model, info = model_class.from_pretrained(
                folder,
                dtype=dtype or "auto",
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **plain,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: its weights cannot be loaded ({error_text(error)}). Download the model again."
        ) from error
    if stored:
        info = stored_layers.install(model, Path(folder), family, info)
    # transformers fills missing tensors with random numbers and warns; a base must be complete.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(str(name) for name in info[kind])
            raise CheckpointError(
                f"{folder}: {len(names)} tensors are {kind.split('_')[0]} for {family.model_class}, e.g. {names[0]}. "
                "Download the model again."
            )
    return model


def check_fit(folder: str | Path, family: Family) -> None:
    """Compare config.json with the headers of the weights.

    Without this check a model of a different size would be filled with random numbers, or would not fit into memory.

    Raises:
        CheckpointError: a tensor of the model is missing or has a different shape, or the files have an unexpected one.
    """
    config, _ = load_config(folder)
    live = {name: tuple(tensor.shape) for name, tensor in empty_model(config, family).state_dict().items()}
    check_shapes(folder, family, live, tied=family.sizes(config).text.tied)


def check_shapes(folder: str | Path, family: Family, shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    """Compare the tensors of a model with the headers of its weights.

    Args:
        folder: with the weights.
        family: of the model.
        shapes: name of each tensor in transformers -> its shape.
        tied: whether the head is the embedding.

    Raises:
        CheckpointError: a tensor of the model is missing or has a different shape, or the files have an unexpected one.
    """
    head = family.published_name(family.head)
    files = stored_shapes(Path(folder), family)
    if tied:  # files may store the head once or twice
        shapes = {name: shape for name, shape in shapes.items() if name != family.head}
        files = {name: shape for name, shape in files.items() if family.published_name(name) != head}
    found = match(family, shapes, files)
    faults = {
        "missing": found.missing,
        "unexpected": found.unexpected,
        "mismatched": [
            f"{name} ({list(theirs)} in the files, {list(ours)} by config.json)"
            for name, (theirs, ours) in found.mismatched.items()
        ],
    }
    for kind, names in faults.items():
        if names:
            raise CheckpointError(
                f"{folder}: {len(names)} tensors are {kind} for {family.model_class}, e.g. {names[0]}. "
                "config.json and the weights belong to different models. Download the model again."
            )
    if found.square:
        raise CheckpointError(
            f"{folder}: its experts are stored transposed, and {len(found.square)} of them are square, e.g. "
            f"{found.square[0]}. transformers transposes experts by their shape, so it reads these wrongly. Load the "
            "model with the program that wrote it, and save it with each expert as [out, in]."
        )


@contextlib.contextmanager
def loaded_whole(args: TrainFlags) -> Iterator[None]:
    """Within this context transformers and PEFT see no ZeRO-3, and make whole tensors on the host or on meta.

    Otherwise transformers builds the model in partitions: it neither reports missing tensors nor lets towers have their
    own dtypes, and cannot build it on meta. The price: until the weights are partitioned, each process holds the whole
    model in the host's memory (2 bytes per weight: 8 x 17 GB on a node of 8 for a 7B model). A device never holds it.
    """
    if not args.deepspeed:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def empty_model(config: Any, family: Family) -> torch.nn.Module:
    """The architecture on the meta device: names and shapes, no memory.

    Raises:
        CheckpointError: sizes in the config contradict each other.
    """
    import torch
    import transformers

    try:
        with torch.device("meta"):
            return getattr(transformers, family.model_class)(config)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"{config._name_or_path}: its config.json describes no {family.model_class} ({error_text(error)}). "
            "Download the model again."
        ) from error

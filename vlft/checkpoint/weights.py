"""Weights of a model or an adapter: compute their fingerprint, and load them strictly into a live model.

The stock Trainer resumes a full Qwen2-VL with `strict=False` under names that no longer exist, and only warns
(transformers 5.17 and 5.23). The two loaders here replace it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoint.adapter import PREFIX, Adapter
from vlft.checkpoint.files import ADAPTER_WEIGHTS, family_of
from vlft.checkpoint.rewrite import parts
from vlft.errors import CheckpointError
from vlft.families import Family, is_tied
from vlft.families.stored import is_carried, match
from vlft.model_files import read_json, slots_in, some_of, stored_slots, tensor_index

if TYPE_CHECKING:
    import torch


def base_fingerprint(folder: Path | str) -> str:
    """A short fingerprint of a model's weights, independent of sharding, key style and lossless dtype.

    Reads one row of each tensor (a vector whole), so a large model takes well under a second from a warm disk.

    Returns:
        16 hex digits of a sha256 over (published name, shape, first row as float32), in the order of names.

    Raises:
        CheckpointError: the errors of `tensor_index` and `family_of`.
    """
    import torch

    folder = Path(folder)
    family = family_of(folder)
    index = tensor_index(folder)
    if is_tied(read_json(folder / "config.json")):
        # It is a copy of the embedding, which some tools write and some do not.
        index.pop(family.published_name(family.head), None)
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = _open_all(stack, index.values())
        for name, file in sorted((family.published_name(name), name) for name in index):
            tensor = files[index[file]].get_slice(file)
            shape = tensor.get_shape()
            row = tensor[:1] if len(shape) > 1 else tensor[:]
            digest.update(f"{name} {shape}\n".encode())
            digest.update(row.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _open_all(stack: ExitStack, files: Iterable[Path]) -> dict[Path, Any]:
    from safetensors import safe_open

    return {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(files)}


def load_weights_strict(model: torch.nn.Module, folder: Path | str, family: Family) -> int:
    """Copy every tensor of a full checkpoint into a live model, in place, each cast to its parameter's dtype.

    Args:
        model: top class of the family (unwrapped), on any device.
        folder: safetensors files, under published or module names.
        family: of the model.

    Returns:
        The number of tensors copied.

    Raises:
        CheckpointError: a name is missing or unexpected, or a shape differs; then nothing is copied. A tied lm_head may
            be missing from the files, but must equal the embedding if it is present.
    """
    import torch

    folder = Path(folder)
    live = model.state_dict(keep_vars=True)
    twin = _twin_of(family.head, live)
    index = tensor_index(folder)
    stored = {name: slot for name, slot in stored_slots(folder).items() if not is_carried(family, name)}
    slots = {name: slot.shape for name, slot in stored.items()}
    spelt = {family.published_name(name): name for name in slots}
    if len(spelt) != len(slots):
        raise CheckpointError(f"{folder}: holds the same tensor under its published and its module name.")
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for name, tensor in live.items():
        slot = stored.get(spelt.get(family.published_name(name), name))
        if tensor.dtype is torch.uint8 and slot is not None and slot.dtype in kinds:
            # Packed values: the files hold the same bytes as numbers of another dtype (`QuantisedFiles.parts`).
            live[name] = tensor.data.view(-1).view(kinds[slot.dtype]).view(-1, 1)
    found = match(family, {name: tuple(tensor.shape) for name, tensor in live.items()}, slots)
    head = family.published_name(family.head)
    missing = [name for name in found.missing if name != head or twin is None]
    _refuse(folder, "the model", missing, list(found.unexpected), found.mismatched)
    with ExitStack() as stack, torch.no_grad():
        files = _open_all(stack, index.values())

        def read(name: str) -> torch.Tensor:
            return files[index[name]].get_tensor(name)

        if twin and head in spelt and not torch.equal(read(spelt[head]), read(spelt[family.published_name(twin)])):
            raise CheckpointError(
                f"{folder}: {head} differs from {family.published_name(twin)}, but the model ties them. "
                "Was it trained with tie_word_embeddings off? Set it to false in config.json, or use the right "
                "checkpoint."
            )
        copies = [
            (name, part)
            for parameter, source in found.sources.items()
            for name, part in zip(source.names, parts(live[parameter], source), strict=True)
        ]
        for name, part in sorted(copies, key=lambda copy: (index[copy[0]], copy[0])):
            part.copy_(read(name))
    return len(copies)


def _twin_of(head: str, live: dict[str, torch.Tensor]) -> str | None:
    """The name of the tensor whose storage a tied head shares; None if the head has its own."""
    if head not in live:
        return None
    return next((name for name, other in live.items() if other is live[head] and name != head), None)


def load_adapter_strict(
    peft_model: torch.nn.Module, folder: Path | str, *, names: Mapping[str, str] | None = None
) -> int:
    """Copy an adapter file into a live peft model, in place, including `modules_to_save`.

    The copy is in place, so an existing optimizer still holds these parameters. The live model keeps its dtypes.

    Args:
        peft_model: a `PeftModel` with an adapter named "default".
        folder: with adapter_model.safetensors.
        names: name in the live model -> name in the file; None: they are the same.

    Returns:
        The number of tensors copied.

    Raises:
        CheckpointError: there is no such file, or a key is missing, unexpected or of another shape; then nothing is
            copied.
    """
    import torch
    from peft import get_peft_model_state_dict

    file = Path(folder) / ADAPTER_WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file. Use a folder that holds an adapter.")
    slots = slots_in(file)
    names = {name: name for name in slots} if names is None else names
    # Its values share storage with the live parameters. "auto" would ask the hub whether the vocabulary grew.
    live = get_peft_model_state_dict(peft_model, adapter_name="default", save_embedding_layers=False)
    with ExitStack() as stack, torch.no_grad():
        opened = _open_all(stack, [file])[file]
        wrong = {
            name: (slots[names[name]].shape, tuple(live[name].shape))
            for name in sorted(live.keys() & names.keys())
            if slots[names[name]].shape != tuple(live[name].shape)
        }
        missing, unexpected = sorted(live.keys() - names.keys()), sorted(names.keys() - live.keys())
        _refuse(file, "the live adapter", missing, unexpected, wrong)
        for name, stored in names.items():
            live[name].copy_(opened.get_tensor(stored))
    return len(names)


def attach_adapter(model: Any, adapter: Adapter, family: Family, *, untied: bool = False) -> Any:
    """Attach an adapter to a loaded base with plain peft, in evaluation mode. Every tensor of the adapter must fit.

    Args:
        model: the base; weights from files beside the adapter are copied into it.
        adapter: as read for this base.
        family: of the base.
        untied: first give a tied head its own tensor, because peft 0.21 merges LoRA of the head into the shared tensor.

    Returns:
        The `PeftModel` around the base.

    Raises:
        CheckpointError: peft refuses the adapter, or its names or shapes are not those of the base.
    """
    from peft import PeftConfig, PeftModel

    from vlft.model.packed import known_to_peft

    _replace(model, adapter.replaced(family), family)
    if untied:
        _untie(model, family)
    try:
        with known_to_peft(model):
            if adapter.renamed:
                adapted = PeftModel(model, PeftConfig.from_peft_type(**adapter.settings_today(family)))
            else:
                adapted = PeftModel.from_pretrained(model, str(adapter.folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{adapter.folder}: peft cannot attach it to the base: {error}") from error
    apart = {PREFIX + name for name in adapter.embeddings(family)}
    names = {live: stored for live, stored in adapter.keys.items() if live not in apart}
    load_adapter_strict(adapted, adapter.folder, names=names)  # peft itself only warns about missing keys
    return adapted.eval()


def _replace(model: Any, replaced: Mapping[str, tuple[Path, str]], family: Family) -> None:
    """Copy tensors from files into parameters of a model. A tied head that gets its own value is untied."""
    import torch

    embedding, head = family.ends
    with ExitStack() as stack, torch.no_grad():
        files = _open_all(stack, (file for file, _ in replaced.values()))
        for name, (file, key) in replaced.items():
            value = files[file].get_tensor(key)
            if name == head and embedding in replaced and model.get_parameter(head) is model.get_parameter(embedding):
                other = files[replaced[embedding][0]].get_tensor(replaced[embedding][1])
                if not torch.equal(value, other):
                    _untie(model, family)
            if model.get_parameter(name).shape != value.shape:
                raise CheckpointError(
                    f"{file}: {key} is {list(value.shape)}, the base has {list(model.get_parameter(name).shape)}. Is "
                    "this the base it was trained on? Pass the right one as --base_model."
                )
            model.get_parameter(name).copy_(value)


def _untie(model: Any, family: Family) -> None:
    """Give a model whose head is its embedding a separate head with the same values."""
    import torch

    module, _, name = family.head.rpartition(".")
    own = torch.nn.Parameter(model.get_parameter(family.head).detach().clone())
    setattr(model.get_submodule(module), name, own)


def _refuse(where: Path, what: str, missing: list[str], unexpected: list[str], wrong: dict[str, tuple]) -> None:
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: its names and those of {what} differ. Missing in the file: {some_of(missing)}; "
            f"unexpected in it: {some_of(unexpected)}. It was saved from another model or other tower settings."
        )
    if wrong:
        shown = some_of(
            f"{name} {list(theirs)} in the file, {list(ours)} live" for name, (theirs, ours) in wrong.items()
        )
        raise CheckpointError(f"{where}: shapes differ from {what}: {shown}. It was saved from another model.")

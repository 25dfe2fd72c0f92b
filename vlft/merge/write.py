"""Write a merged model folder, one shard at a time. Unchanged tensors keep the base's names and bytes."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoint import PICTURE_FILES, processor_files, read_json, rewrite
from vlft.errors import CheckpointError
from vlft.families import untied as untied_config
from vlft.merge.match import MergePlan, Update, shapes_in
from vlft.text import gib

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class WrittenTensor:
    """One tensor of the merged files.

    Attributes:
        dtype: as stored.
        rounded: whether the base held it, or the merge computed it, in a wider dtype.
    """

    dtype: torch.dtype
    rounded: bool


@contextmanager
def full_disk_is_a_user_error(out: Path) -> Iterator[None]:
    """Turn "no space left" from the OS or from safetensors' writer into a `CheckpointError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            free = shutil.disk_usage(out.parent).free
            raise CheckpointError(
                f"{out}: the disk is full. The files written so far were removed; {gib(free)} are free now. "
                "Free some space or use an OUT on another disk."
            ) from error
        raise


def check_space(out: Path, plan: MergePlan, dtype: torch.dtype | None) -> None:
    """Refuse, before anything is written, a merge for which the disk has no space.

    Args:
        out: the merged folder.
        plan: names the base's files.
        dtype: of all tensors; None keeps each tensor's own.

    Raises:
        CheckpointError: the disk has too little space.
    """
    need = sum(file.stat().st_size for file in set(plan.index.values()))
    if dtype is not None:
        need = _elements(plan) * dtype.itemsize
    elif plan.head is not None:
        # The head is as large as the embedding, the largest tensor.
        need += 4 * max(map(math.prod, shapes_in(plan.index.values()).values()))
    free = shutil.disk_usage(out.parent).free
    if need > free:
        raise CheckpointError(
            f"{out}: the merged weights need {gib(need)}, {gib(free)} are free on its disk. "
            "Free some space or use an OUT on another disk."
        )


def _elements(plan: MergePlan) -> int:
    return sum(map(math.prod, shapes_in(plan.index.values()).values()))


def write_weights(
    plan: MergePlan,
    base: Path,
    out: Path,
    dtype: torch.dtype | None,
    progress: Callable[[str], None],
    *,
    trained_on: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    largest: int | None = None,
) -> dict[str, WrittenTensor]:
    """Write every shard of the base under its own file name, with changed tensors merged.

    Args:
        plan: the changes.
        base: folder of the base.
        out: folder to write to.
        dtype: of every floating-point tensor; None keeps each tensor's own.
        progress: called with a line of text per shard.
        trained_on: name and value of a tensor of the base -> the value that training used; None: the same.
        largest: most bytes of a file; None: files are cut as those of the base.

    Returns:
        Tensor name -> how it was written, for every tensor of the merged files.

    Raises:
        CheckpointError: a merged value does not fit the dtype (float16 ends at 65504).
    """
    import torch
    from safetensors import safe_open

    written: dict[str, WrittenTensor] = {}
    changed = {update.file for update in (*plan.updates.values(), plan.head) if update is not None}
    with ExitStack() as stack:
        adapter = {file: stack.enter_context(safe_open(file, framework="pt")) for file in changed}

        def change(source: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
            wanted = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
            weight = weight if trained_on is None else trained_on(source, weight)
            for name, update in _made_of(source, plan):
                merged = weight if update is None else merged_weight(weight, update, adapter[update.file])
                written[name] = WrittenTensor(dtype=wanted, rounded=wanted not in (merged.dtype, torch.float32))
                yield name, _cast(name, merged, wanted)

        rewrite(base, out, change, progress=progress, doing="merge", largest=largest)
    return written


def _made_of(source: str, plan: MergePlan) -> list[tuple[str, Update | None]]:
    """The merged tensors made from one base tensor: itself, and for a tied embedding also the untied head."""
    made = [(source, plan.updates.get(source))]
    embedding, head = plan.ends
    return [*made, (head, plan.head)] if plan.head is not None and source == embedding else made


def merged_weight(weight_OI: torch.Tensor, update: Update, adapter: Any) -> torch.Tensor:
    """The changed tensor in float32, before the cast: W + scale * B @ A as peft computes it, the copy, or new rows.

    DoRA (arXiv 2402.09353) then gives each row of the sum the length that the adapter holds for it.

    Args:
        weight_OI: the base's tensor.
        update: how it changes; `keep` returns it in its own dtype.
        adapter: the opened `update.file`.
    """
    if update.how == "keep":
        return weight_OI
    if update.how == "replace":
        return adapter.get_tensor(update.keys[0]).float()
    if update.how == "rows":
        import torch

        rows_nI = adapter.get_tensor(update.keys[0]).float()
        return weight_OI.float().index_copy(0, torch.tensor(update.ids), rows_nI)
    a_RI, b_OR, *others = (adapter.get_tensor(key).float() for key in update.keys)
    weight_OI = others.pop() if update.onto else weight_OI.float()
    changed_OI = weight_OI + (b_OR @ a_RI) * update.scale
    if update.how == "lora":
        return changed_OI
    (magnitude_O,) = others
    return (magnitude_O / changed_OI.norm(dim=1))[:, None] * changed_OI


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.to(dtype)
    if cast.is_floating_point() and not cast.isfinite().all():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name}: holds NaN or infinity; the run diverged. Merge an earlier checkpoint-N.")
        raise CheckpointError(
            f"{name}: its largest value, {tensor.abs().max().item():g}, does not fit {dtype} "
            "(float16 ends at 65504). Use --dtype bf16 or keep."
        )
    return cast.contiguous()


def write_settings(base: Path, run: Path, out: Path, dtype: torch.dtype | None, *, untied: bool) -> None:
    """Write config.json and generation_config.json of the base, and processor, tokenizer and chat template.

    The run's own processor, tokenizer and chat template take precedence over the base's. The base's files are copied
    byte by byte. Only in config.json, dtype fields change if `dtype` is set, and `tie_word_embeddings` if `untied`.

    Args:
        base: folder of the base.
        run: folder of the adapter.
        out: folder to write to.
        dtype: of all tensors; None keeps each tensor's own.
        untied: whether head and embedding differ after the merge.
    """
    if dtype is None and not untied:
        shutil.copyfile(base / "config.json", out / "config.json")
    else:
        config = read_json(base / "config.json")
        if dtype is not None:
            config = _with_dtype(config, str(dtype).removeprefix("torch."))
        if untied:
            config = untied_config(config)
        (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", out / "generation_config.json")
    for file in processor_files(run, base):
        shutil.copyfile(file, out / file.name)
    _keep_old_processor_file(base, out)


def _with_dtype(config: Any, word: str) -> Any:
    """A copy of a config with every `torch_dtype` and `dtype` in it, also those of towers, set to `word`."""
    if isinstance(config, dict):
        return {
            key: word if key in ("torch_dtype", "dtype") and value is not None else _with_dtype(value, word)
            for key, value in config.items()
        }
    return config


def _keep_old_processor_file(base: Path, out: Path) -> None:
    """Write preprocessor_config.json if the base has it and the run has only processor_config.json.

    transformers 5 saves and prefers processor_config.json; older servers read only preprocessor_config.json. Both get
    the run's pixel settings.
    """
    old, new = out / PICTURE_FILES[0], out / PICTURE_FILES[1]
    if old.is_file() or not new.is_file() or not (base / PICTURE_FILES[0]).is_file():
        return
    pictures = read_json(new).get("image_processor")
    if not isinstance(pictures, dict):
        return
    settings = read_json(base / PICTURE_FILES[0]) | pictures
    size = pictures.get("size") or {}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if edge in size:
            settings[key] = size[edge]
    old.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

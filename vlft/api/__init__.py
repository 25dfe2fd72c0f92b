"""The public functions of vlft, for your own training loop or notebook: `from vlft import open_base, ...`.

They call the same code as `vlft train`: `setup` for base, rows and order, `data` for the loader, `train.model_setup`
for the model. Options are the flags of `vlft train`, with the same names and checks. Each function takes the flags that
have an effect on it. Its result stores them for the functions that take it, so no flag is passed twice.
`vlft/__init__.py` imports this module when one of its names is first used.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import set_seed

from vlft import setup
from vlft.api import saving
from vlft.api.door import check_arguments, mark_model, speaks_python
from vlft.api.evaluation import evaluate as evaluate
from vlft.api.forward import take_batches
from vlft.api.keywords import Flag, parsed, said
from vlft.api.loader import Loader
from vlft.api.objects import Base, Rows, row_index
from vlft.config.flags import Mode
from vlft.config.machine import check_device
from vlft.data.dataset import RowDataset
from vlft.data.order import Order, RankBatches
from vlft.data.workers import loader_options
from vlft.errors import ConfigError, UsageError
from vlft.model import groups, kernels
from vlft.preview import preview_sample
from vlft.preview.text import as_text
from vlft.setup.schedule import PATCHES_PER_TOKEN, evaluation_order, pack_budget, training_order
from vlft.train.model_setup import prepare_model
from vlft.train.ranks import on_rank_zero

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel

LOG = logging.getLogger("vlft")
#: Flags of a loader that have an effect only in training, or only in evaluation.
_OF_TRAINING = {"global_batch", "gradient_accumulation_steps", "per_device_train_batch_size", "seed"}
_OF_EVALUATION = {"per_device_eval_batch_size"}


@speaks_python
def open_base(model_id: str | os.PathLike[str], *, model_revision: str | None = None, **flags: Flag) -> Base:
    """Open a base model, and set how rows become tokens and pixels. Loads no weights.

    Args:
        model_id: a local folder, or a Hugging Face id, which is downloaded once.
        model_revision: branch, tag or commit of a Hugging Face id.
        flags: `image_min_pixels`, `image_max_pixels`, `fps`, `max_length`, `packing`, `pack_tokens`, `use_cpu` and
            others (`vlft.api.keywords.TAKES`), with the values of `vlft train`.

    Returns:
        The base, for the other functions.

    Raises:
        UsageError: a flag is unknown or belongs to another function, or an argument is of the wrong type.
        ConfigError: a flag has no effect or cannot be carried out.
        CheckpointError: the base is missing, not a Qwen-VL, quantised or incomplete.
    """
    given = {"model_id": model_id, "model_revision": model_revision, **flags}
    data, model, _ = parsed("open_base", given)
    return Base(opened=setup.open_base(data, model, given=frozenset()), flags=said(given))


@speaks_python
def load_rows(
    base: Base,
    data_path: Flag = None,
    *,
    image_folder: str | os.PathLike[str] | None = None,
    **flags: Flag,
) -> Rows:
    """Read data files, and measure the tokens and patches of every row from the headers of its media.

    Args:
        base: from `open_base`. Its tokenizer and pixel settings are used.
        data_path: one or more data files or folders; None if `data_mix` lists them.
        image_folder: the folder that relative media paths start from; None: each data file's own folder.
        flags: `on_bad_row`, `columns`, `data_mix`, `missing_tags` and others (`vlft.api.keywords.TAKES`).

    Returns:
        The rows that can be trained.

    Raises:
        UsageError: a flag is unknown or belongs to another function, or an argument is of the wrong type.
        ConfigError: a row is refused (`on_bad_row="skip"` skips it instead), no row is left, or a file cannot be read.
    """
    check_arguments("load_rows", base=base)
    given = {"data_path": data_path, "image_folder": image_folder, **flags}
    data, _, args = parsed("load_rows", given, base.flags)
    workers = args.dataloader_num_workers
    measured = on_rank_zero(lambda: setup.training_rows(data, base.opened, workers=workers))
    for note in measured.notes:
        LOG.info(note)
    if bad := measured.rows.bad:
        LOG.warning("%d of %d rows are skipped, the first is %s", len(bad), sum(measured.rows.counts.values()), bad[0])
    return Rows(measured=measured, base=base, flags={**base.flags, **said(given)})


@speaks_python
def data_loader(
    base: Base, rows: Rows, *, global_batch: int | None = None, shuffle: bool = True, **flags: Flag
) -> Loader:
    """Build a loader of packed micro-batches, in the order in which `vlft train` would train the rows.

    Args:
        base: from `open_base`. It encodes the rows.
        rows: from `load_rows`.
        global_batch: rows of an optimizer step, over all processes; None: one micro-batch per process.
        shuffle: True for training; False does not shuffle the rows, for evaluation.
        flags: `seed`, `dataloader_num_workers`, `gradient_accumulation_steps` and others (`vlft.api.keywords.TAKES`).

    Returns:
        The loader of this process.

    Raises:
        UsageError: a flag is unknown or belongs to another function, or an argument is of the wrong type.
        ConfigError: a flag has no effect, or `global_batch` cannot be reached.
    """
    check_arguments("data_loader", base=base, rows=rows)
    if not isinstance(shuffle, bool):
        raise UsageError(f"shuffle is {shuffle!r}, must be True or False")
    if not rows:
        raise ConfigError("rows is empty: there is nothing to load")
    given = {"global_batch": global_batch, **flags}
    data, _, args = parsed("data_loader", given, rows.flags)
    if idle := sorted(said(given).keys() & (_OF_EVALUATION if shuffle else _OF_TRAINING)):
        raise ConfigError(f"{idle[0]} has no effect with shuffle={shuffle}. Drop one of the two.")
    costs = rows.measured.costs
    order: Order
    if shuffle:
        order = on_rank_zero(lambda: training_order(costs, data, args, world=args.world_size))
    else:
        order = evaluation_order(costs, data, args, world=args.world_size)
    opened = base.opened
    batches = RankBatches(order, rank=args.process_index)
    loader: DataLoader[Any] = DataLoader(
        RowDataset(rows.measured.rows.samples, opened.encoder, costs),
        batch_sampler=batches,
        collate_fn=opened.collator(),
        generator=torch.Generator().manual_seed(args.seed),  # without it each pass would use the global generator
        prefetch_factor=args.dataloader_prefetch_factor,
        **loader_options(args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory),
    )
    return Loader(loader, batches, on_bad_row=data.on_bad_row)


@speaks_python
def load_model(
    base: Base, *, vision: Mode = "frozen", merger: Mode = "frozen", language: Mode = "lora", **flags: Flag
) -> Model:
    """Load the weights and prepare them for training, on this process's device.

    `model(**batch).loss` of a batch of `data_loader` is this micro-batch's share of the step's loss, which is the mean
    over the trained tokens of the step. So the gradients of a step's micro-batches are summed, and DDP may average
    them over processes. The forward moves the batch to the device, and uses bf16 autocast if `vlft train` would. Other
    methods, such as `generate`, are the ones of transformers.

    Args:
        base: from `open_base`.
        vision: how the vision tower trains: `full`, `lora` or `frozen`.
        merger: how the merger trains: `full`, `lora` or `frozen`.
        language: how the language model trains: `full`, `lora` or `frozen`.
        flags: `lora_rank`, `lora_alpha`, `lora_dropout`, `attn`, `bf16`, `gradient_checkpointing` and others
            (`vlft.api.keywords.TAKES`). `seed` (42) seeds the random generators, as at the start of a run.

    Returns:
        The model of transformers in training mode, wrapped by PEFT if a tower is `lora`.

    Raises:
        UsageError: a flag is unknown or belongs to another function, or an argument is of the wrong type.
        ConfigError: a flag has no effect or cannot be carried out.
        CheckpointError: weights are missing, unexpected or of another shape.
    """
    check_arguments("load_model", base=base)
    own = {"vision": vision, "merger": merger, "language": language, **flags}
    data, model_flags, args = parsed("load_model", own, base.flags)
    check_device(args, model_flags.attn, model_flags.linear_attn)
    kernels.check(args.liger, args.device)
    # Opened again, because `base` was opened without the flags of the towers.
    start = setup.start_of(model_flags)
    opened = setup.open_base(data, model_flags, given=frozenset(said(own)), start=start)
    budget = pack_budget(data)
    # The most tokens and patches of a micro-batch.
    tokens = opened.recipe.max_length if budget is None else budget.tokens
    patches = PATCHES_PER_TOKEN * tokens if budget is None else budget.patches
    set_seed(args.seed)
    model, chosen = prepare_model(
        opened,
        args,
        choice=model_flags.attn,
        linear=model_flags.linear_attn,
        start=opened.start,
        say=LOG.info,
        tokens=tokens,
        patches=patches,
    )
    LOG.info("%s", chosen)
    model.train()
    take_batches(model, args)
    mark_model(model, base)
    ready: Any = model
    return ready


@speaks_python
def parameter_groups(
    base: Base, model: torch.nn.Module, *, learning_rate: float | None = None, **flags: Flag
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer of torch: a rate for each tower, no weight decay on norms and biases.

    Args:
        base: the base of `model`.
        model: from `load_model`.
        learning_rate: of the language model, and the default for the other towers; None: the default of `vlft train`.
        flags: `vision_lr`, `merger_lr`, `weight_decay`, `loraplus_ratio`.

    Returns:
        Groups with the keys `params`, `lr`, `weight_decay` and `name`.

    Raises:
        UsageError: a flag is unknown or belongs to another function, or an argument is of the wrong type.
        ConfigError: a flag cannot be carried out.
    """
    check_arguments("parameter_groups", base=base, model=model)
    _, _, args = parsed("parameter_groups", {"learning_rate": learning_rate, **flags}, base.flags)
    found = groups.parameter_groups(
        model,
        base.opened.family,
        **groups.rates(args),
    )
    trained = {group.name.partition("_")[0] for group in found if group.trainable}
    for tower in ("vision", "merger"):
        if (rate := flags.get(f"{tower}_lr")) is not None and tower not in trained:
            raise ConfigError(
                f"--{tower}_lr {rate} has no effect: --{tower} is frozen. Drop it, or set --{tower} to full or lora."
            )
    return [
        {"params": list(group.tensors), "lr": group.lr, "weight_decay": group.weight_decay, "name": group.name}
        for group in found
        if group.trainable
    ]


@speaks_python
def preview_row(base: Base, rows: Rows, index: int) -> str:
    """Return a row as the model sees it, as text: trained tokens are between ⟦ and ⟧, the pads of a picture are folded.

    Args:
        base: from `open_base`.
        rows: from `load_rows`.
        index: the row's index in `rows`.

    Raises:
        UsageError: an argument is of the wrong type, or the rows were loaded with another base.
        IndexError: there is no such row.
        DataError: the row's media cannot be decoded.
    """
    check_arguments("preview_row", base=base, rows=rows)
    return as_text(preview_sample(rows[row_index(index)], base.opened), color=False)


@speaks_python
def save_model(base: Base, model: torch.nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save an adapter, or a whole model in the dtypes of the base, and the processor with the settings of the training.

    `vlft merge`, `vlft chat`, plain peft (an adapter) and plain transformers (a whole model) can load the folder.

    Args:
        base: the base of `model`.
        model: from `load_model`.
        folder: created if it does not exist. An earlier save of the same base and kind is overwritten.

    Raises:
        UsageError: an argument is of the wrong type, or `model` was loaded from another base.
        ConfigError: the folder is the base's own, holds a run or another model, or cannot be written.
    """
    check_arguments("save_model", base=base, model=model)
    saving.save(base, model, folder)

"""The public functions of vlft, for your own training loop or notebook: `from vlft import open_base, ...`.

They call the same code as `vlft train`: `setup` for base, rows and order, `data` for the loader, `train.model_setup`
for the model. Options are the flags of `vlft train`, with the same names and checks. Each function takes the flags that
have an effect on it. Its result stores them for the functions that take it, so no flag is passed twice.
`vlft/__init__.py` imports this module when one of its names is first used.
"""

from __future__ import annotations

import functools
import logging
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch.utils.data import DataLoader
from transformers import set_seed

from vlft import setup
from vlft.api.keywords import Flag, parsed, said
from vlft.api.loader import Loader
from vlft.config.flags import Mode, TrainFlags
from vlft.config.machine import check_device
from vlft.data.dataset import RowDataset
from vlft.data.order import Order, RankBatches
from vlft.data.sample import Sample
from vlft.data.workers import loader_options
from vlft.errors import BadRow, ConfigError
from vlft.model import groups, kernels
from vlft.model.forward import FORWARD_KEYS
from vlft.preview import preview_sample
from vlft.preview.text import as_text
from vlft.setup.schedule import PATCHES_PER_TOKEN, evaluation_order, pack_budget, training_order
from vlft.train.folder import save_processor, stored_dtypes
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


@dataclass(frozen=True, kw_only=True)
class Base:
    """An opened base model whose weights are not loaded yet. `open_base` returns it.

    Attributes:
        opened: folder, config, family, processor and encoder, as `vlft train` opens them.
        flags: the flags that were passed to `open_base`.
    """

    opened: setup.Base = field(repr=False)
    flags: Mapping[str, Flag]

    @property
    def processor(self) -> Any:
        """The stock processor of transformers, with the pixel and frame settings of the flags."""
        return self.opened.processor

    @property
    def config(self) -> Any:
        """The base's config, a config object of transformers."""
        return self.opened.config


@dataclass(frozen=True, kw_only=True)
class Rows(Sequence[Sample]):
    """Rows that can be trained. `load_rows` returns it. Indexing parses a row; no media are opened.

    Attributes:
        measured: the rows, the cost of each row, and the refused rows.
        flags: the flags that were passed to `open_base` and `load_rows`.
    """

    measured: setup.MeasuredRows = field(repr=False)
    flags: Mapping[str, Flag]

    def __len__(self) -> int:
        return len(self.measured.rows.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        return self.measured.rows.samples[index]

    @property
    def skipped(self) -> tuple[BadRow, ...]:
        """Rows that are not trained, each with its reason (`on_bad_row="skip"`)."""
        return self.measured.rows.bad


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
        UsageError: a flag is unknown, or belongs to another function.
        ConfigError: a flag has no effect or cannot be carried out.
        CheckpointError: the base is missing, not a Qwen-VL, quantised or incomplete.
    """
    given = {"model_id": model_id, "model_revision": model_revision, **flags}
    data, model, _ = parsed("open_base", given)
    return Base(opened=setup.open_base(data, model, given=frozenset()), flags=said(given))


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
        UsageError: a flag is unknown, or belongs to another function.
        ConfigError: a row is refused (`on_bad_row="skip"` skips it instead), no row is left, or a file cannot be read.
    """
    given = {"data_path": data_path, "image_folder": image_folder, **flags}
    data, _, args = parsed("load_rows", given, base.flags)
    workers = args.dataloader_num_workers
    measured = on_rank_zero(lambda: setup.training_rows(data, base.opened, workers=workers))
    for note in measured.notes:
        LOG.info(note)
    if bad := measured.rows.bad:
        LOG.warning("%d of %d rows are skipped, the first is %s", len(bad), sum(measured.rows.counts.values()), bad[0])
    return Rows(measured=measured, flags={**base.flags, **said(given)})


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
        UsageError: a flag is unknown, or belongs to another function.
        ConfigError: a flag has no effect, or `global_batch` cannot be reached.
    """
    given = {"global_batch": global_batch, **flags}
    data, _, args = parsed("data_loader", given, rows.flags)
    if idle := sorted(said(given).keys() & (_OF_EVALUATION if shuffle else _OF_TRAINING)):
        raise ConfigError(f"data_loader(): {idle[0]} has no effect with shuffle={shuffle}. Drop one of the two.")
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
        UsageError: a flag is unknown, or belongs to another function.
        ConfigError: a flag has no effect or cannot be carried out.
        CheckpointError: weights are missing, unexpected or of another shape.
    """
    own = {"vision": vision, "merger": merger, "language": language, **flags}
    data, model_flags, args = parsed("load_model", own, base.flags)
    check_device(args, model_flags.attn)
    kernels.check(args.liger, args.device)
    # Opened again, because `base` was opened without the flags of the towers.
    opened = setup.open_base(data, model_flags, given=frozenset(said(own)))
    budget = pack_budget(data)
    # The most tokens and patches of a micro-batch.
    tokens = opened.recipe.max_length if budget is None else budget.tokens
    patches = PATCHES_PER_TOKEN * tokens if budget is None else budget.patches
    set_seed(args.seed)
    model, chosen = prepare_model(opened, args, choice=model_flags.attn, say=LOG.info, tokens=tokens, patches=patches)
    LOG.info("%s", chosen)
    model.train()
    _take_batches(model, args)
    ready: Any = model
    return ready


def _take_batches(model: torch.nn.Module, args: TrainFlags) -> None:
    """Bind a forward that takes the batches of `data_loader` and weights their loss."""
    inner, half, world = model.forward, args.half, args.world_size

    @functools.wraps(inner)  # generate() reads the signature of `forward`
    def forward(self: torch.nn.Module, *args: Any, **batch: Any) -> Any:
        if batch.get("cu_seqlens") is None:
            return inner(*args, **batch)
        device = next(self.parameters()).device
        taken = {key: batch[key] for key in FORWARD_KEYS}
        taken |= {k: v.to(device, non_blocking=True) for k, v in taken.items() if isinstance(v, torch.Tensor)}
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            outputs = inner(**taken, return_logits=batch.get("return_logits", False))
        tokens = batch.get("num_items_in_batch") or max(1, len(batch["targets"]))
        outputs.loss = outputs.loss * (world / tokens)  # DDP averages gradients over processes
        return outputs

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def parameter_groups(
    base: Base, model: torch.nn.Module, *, learning_rate: float | None = None, **flags: Flag
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer of torch: a rate for each tower, no weight decay on norms and biases.

    Args:
        base: the base of `model`.
        model: from `load_model`.
        learning_rate: of the language model, and the default for the other towers; None: the default of `vlft train`.
        flags: `vision_lr`, `merger_lr`, `weight_decay`.

    Returns:
        Groups with the keys `params`, `lr`, `weight_decay` and `name`.

    Raises:
        UsageError: a flag is unknown, or belongs to another function.
        ConfigError: a flag cannot be carried out.
    """
    _, _, args = parsed("parameter_groups", {"learning_rate": learning_rate, **flags}, base.flags)
    found = groups.parameter_groups(
        model, base.opened.family, learning_rates=args.learning_rates, weight_decay=args.weight_decay
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


def preview_row(base: Base, rows: Rows, index: int) -> str:
    """Return a row as the model sees it, as text: trained tokens are between ⟦ and ⟧, the pads of a picture are folded.

    Args:
        base: from `open_base`.
        rows: from `load_rows`.
        index: the row's index in `rows`.

    Raises:
        DataError: the row's media cannot be decoded.
    """
    return as_text(preview_sample(rows[index], base.opened), color=False)


def save_model(base: Base, model: torch.nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save an adapter, or a whole model in the dtypes of the base, and the processor with the settings of the training.

    `vlft merge`, `vlft chat`, plain peft (an adapter) and plain transformers (a whole model) can load the folder.

    Args:
        base: the base of `model`.
        model: from `load_model`.
        folder: created if it does not exist.

    Raises:
        OSError: the folder cannot be written.
    """
    live: Any = model
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    if hasattr(live, "peft_config"):
        card = out / "README.md"
        mine = card.exists()
        live.save_pretrained(out, save_embedding_layers=False)  # without it PEFT asks the hub for the vocabulary's size
        if not mine:
            card.unlink(missing_ok=True)  # PEFT's empty model card
    else:
        dtypes = stored_dtypes(base.opened)
        tensors = {k: v.detach().to("cpu", dtypes.get(k, v.dtype)) for k, v in live.state_dict().items()}
        live.save_pretrained(out, state_dict=tensors)
    save_processor(base.processor, out)

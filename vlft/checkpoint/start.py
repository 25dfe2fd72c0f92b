"""The adapter that a new run starts from (`--adapter`): read, compared with the base and the flags, and loaded.

`read_start` and `Start.agree` need neither torch nor peft, so a wrong adapter is refused at once. `prove_start` also
compares fingerprints and every setting of peft. `load_start` copies the weights into a live model. A resumed run has
its weights in a checkpoint: `recorded_start` takes what else it needs from its record, and the adapter may be gone.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoint.adapter import Adapter, read_adapter
from vlft.checkpoint.chosen_parts import blocks_in, check_record, recorded, tokens_in
from vlft.checkpoint.files import ADAPTER_CONFIG, module_name
from vlft.checkpoint.fits import check_copies, check_matrices, instead, lora_target
from vlft.checkpoint.folders import Located, find_adapter_or_model
from vlft.checkpoint.lineage import check_lineage, refuse_other_family
from vlft.checkpoint.plain_lora import check_plain, towers_of_adapter
from vlft.checkpoint.quantised import quantisation_of, settings_of
from vlft.checkpoint.record import RunRecord
from vlft.checkpoint.weights import load_adapter_strict
from vlft.config.blocks import as_text
from vlft.config.checks import OF_ADAPTER
from vlft.config.places import near_miss
from vlft.config.said import quoted
from vlft.errors import CheckpointError, ConfigError
from vlft.families import TOWERS, Family, Sizes
from vlft.families.stored import is_carried
from vlft.model.quantised_files import stored_shapes
from vlft.model.towers import Towers
from vlft.model_files import contents_print, read_json
from vlft.text import counted

if TYPE_CHECKING:
    import torch

    from vlft.model.quantise import Quantisation

#: Key of `RunRecord.training`: the adapter that the run started from, and the one that this was trained from.
LINEAGE = "adapter"
_VARIANTS = ("use_dora", "use_rslora")


@dataclass(frozen=True, kw_only=True)
class Start:
    """The adapter that a run starts from.

    Attributes:
        name: `--adapter`, as the user wrote it.
        settings: flag of `OF_ADAPTER` -> the adapter's value; also flags of quantised bases, if it was trained on one.
        found: the adapter's folder, with its record if vlft wrote it; None for a resumed run.
        adapter: names and shapes of its tensors; None for a resumed run.
        known: the entry of a resumed run's record; None for a new run.
        origin: how it is known that it belongs to the base, as a sentence; "" until `prove_start`.
        blocks: flag (language_blocks, vision_blocks) -> places of the adapter's blocks, only for towers with a choice.
        tokens: ids whose rows it trains, in ascending order.
    """

    name: str
    settings: Mapping[str, Any]
    found: Located | None = None
    adapter: Adapter | None = None
    known: Mapping[str, Any] | None = None
    origin: str = ""
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """The entry of vlft.json: `path`, `fingerprint` of the adapter's weights, and `parent`.

        `parent` is the same entry of the run that trained the adapter, or None. Reads all of the adapter once.
        """
        if self.known is not None:
            return dict(self.known)
        if self.adapter is None:
            raise ValueError("neither an adapter nor a record")
        record = None if self.found is None else self.found.record
        return {
            "path": _whole(self.name),
            "fingerprint": contents_print(self.adapter.file),
            "parent": None if record is None else record.training.get(LINEAGE),
        }

    def agree(self, given: Mapping[str, Any]) -> None:
        """Compare the adapter with the flags that the user set.

        Args:
            given: flag -> value; flags that the adapter does not decide are ignored.

        Raises:
            ConfigError: names the first flag with another value, and both values.
        """
        for flag, value in self.settings.items():
            if flag in given and given[flag] != value:
                raise ConfigError(
                    f"--{flag} is {_plain(given[flag])}, but the adapter {self.name} has {_plain(value)}. The "
                    f"adapter decides it: use --{flag} {quoted(_plain(value))}, or drop --{flag}.\n  To train anything "
                    f"else, merge it first (vlft merge {self.name} OUT), then use --model_id OUT without --adapter."
                )

    def described(self, given: Collection[str] = (), *, quantisation: Quantisation | None = None) -> str:
        """What it is, and which flags it decides because the user did not set them.

        Args:
            given: names of the flags that the user set.
            quantisation: of the run's base. An adapter of an unquantised base may train further on a quantised one,
                which is said here.
        """
        settings = {flag: value for flag, value in self.settings.items() if value is not False}  # no unused variants
        settings |= {flag: as_text(places) for flag, places in self.blocks.items()}
        shown = ", ".join(f"{flag.removeprefix('lora_')} {_plain(value)}" for flag, value in settings.items())
        taken = [f"--{flag}" for flag in settings if flag not in given]
        if count := len(self.tokens):
            shown += f", {counted(count, 'trained token')}"
            taken += ["--train_tokens"] if "train_tokens" not in given else []
        decided = f"; it decides {', '.join(taken)}" if taken else ""
        coarser = ""
        if quantisation is not None and "bits" not in self.settings:
            coarser = (
                f"; it was trained on a base that was not quantised, and this run quantises it to {quantisation.kind}, "
                "so the first loss differs from the adapter's last"
            )
        return f"{self.name} (fingerprint {self.lineage['fingerprint']}): {shown}{decided}{coarser}"


def read_start(path: str, base_id: str, base: Path, family: Family) -> Start:
    """Read an adapter to start from: names and shapes only.

    Args:
        path: run folder, `checkpoint-N`, or adapter folder of plain peft.
        base_id: `--model_id`.
        base: its folder.
        family: of the base.

    Raises:
        CheckpointError: there is no adapter, it is of another base or is not plain LoRA, or it does not train what
            vlft can train in one adapter.
    """
    if not Path(path).expanduser().is_dir():
        raise CheckpointError(
            f"--adapter {path}: no such folder{near_miss(path)}. Give a run's --output_dir, one of its checkpoint-N, "
            "or an adapter folder."
        )
    with _named():
        found = find_adapter_or_model(path)
        if found.kind == "full":
            raise CheckpointError(
                f"{path}: is a whole model, not an adapter. To start from it, use --model_id {path} without --adapter."
            )
        settings = read_json(found.folder / ADAPTER_CONFIG)
        if settings.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: peft_type is {settings.get('peft_type')!r}, not 'LORA'. {instead(path)}")
        refuse_other_family(path, found, base_id, base)
        adapter = read_adapter(found.folder, base, family)
        parts = _settings(path, found, adapter, base, family)
        return Start(name=path, found=found, adapter=adapter, **parts)


def recorded_start(path: str, record: RunRecord) -> Start | None:
    """The start of a run that resumes, from its record alone.

    Args:
        path: `--adapter`.
        record: of the run to resume.

    Returns:
        None if that run did not start from this folder.
    """
    known = record.training.get(LINEAGE)
    if not known or os.path.realpath(known["path"]) != os.path.realpath(_whole(path)):
        return None
    lora = record.lora or {}
    settings = {**record.towers, **{flag: lora.get(flag.removeprefix("lora_")) for flag in OF_ADAPTER[len(TOWERS) :]}}
    settings |= {flag: bool(lora.get(flag.removeprefix("use_"))) for flag in _VARIANTS} | _quantised(path, record)
    blocks, tokens = recorded(record)
    return Start(name=path, settings=settings, known=known, blocks=blocks, tokens=tokens)


def prove_start(start: Start, base_id: str, base: Path) -> Start:
    """Compare every setting of an adapter with plain LoRA, and its base with this one. Returns it with its `origin`.

    Args:
        start: as read.
        base_id: `--model_id`.
        base: its folder.

    Raises:
        CheckpointError: the adapter is not plain LoRA, or was trained on other weights.
    """
    if start.found is None or start.adapter is None:
        return start
    with _named():
        where = start.adapter.folder / ADAPTER_CONFIG
        check_plain(
            start.adapter.settings, where, refusal=f"no run can start from it. {instead(start.name)}".rstrip(".")
        )
        return replace(start, origin=check_lineage(start.name, start.found, base_id, base))


def load_start(model: torch.nn.Module, start: Start) -> int:
    """Copy the adapter's weights into a live model's new adapter. Returns the number of tensors.

    Args:
        model: wrapped by PEFT, with the towers of `start.settings`; keeps its dtypes.
        start: as read.

    Raises:
        CheckpointError: a tensor is missing or unexpected, or has another shape; then nothing is copied.
    """
    if start.adapter is None:
        raise ValueError("a resumed run reads its checkpoint, not the adapter that it started from")
    with _named():
        return load_adapter_strict(model, start.adapter.folder, names=start.adapter.keys)


@contextmanager
def _named() -> Iterator[None]:
    """Let errors begin with the flag, and name --model_id, which sets the base of a run, for --base_model."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"--adapter {error}".replace("--base_model", "--model_id")) from None


def _settings(path: str, found: Located, adapter: Adapter, base: Path, family: Family) -> dict[str, Any]:
    """`settings`, `blocks` and `tokens` of a `Start` under which vlft would make exactly the tensors of an adapter.

    Raises:
        CheckpointError: there are none.
    """
    if adapter.copies:
        file = next(iter(adapter.copies.values()))[0].name
        raise CheckpointError(
            f"{path}: beside the adapter, {file} holds weights that were trained in full. {instead(path)}"
        )
    variants = {name: bool(adapter.settings.get(name)) for name in _VARIANTS}
    switches = [name for name, value in adapter.settings.items() if name.startswith("use_") and value is True]
    if other := [name for name in switches if name not in variants]:
        raise CheckpointError(
            f"{path}: {ADAPTER_CONFIG} has {other[0]}=true; vlft trains LoRA, DoRA and rsLoRA. {instead(path)}"
        )
    if adapter.settings.get("alpha_pattern"):
        raise CheckpointError(f"{path}: its modules have several alphas (alpha_pattern). {instead(path)}")
    modes: Any = towers_of_adapter(adapter.keys, family)
    if "lora" not in modes.values():
        raise CheckpointError(f"{path}: holds no LoRA matrices. {instead(path)}")
    if modes["language"] == "full":
        raise CheckpointError(f"{path}: holds the language model in full. {instead(path)}")
    if found.record is not None and found.record.towers != modes:
        raise CheckpointError(
            f"{path}: vlft.json says it trained {found.record.towers}, the adapter's tensors say {modes}. The folder "
            "mixes two runs, or the adapter was not saved completely."
        )
    slots = {module_name(family, n): s for n, s in stored_shapes(base, family).items() if not is_carried(family, n)}
    rank = adapter.settings["r"]
    check_matrices(path, adapter, rank, slots)
    sizes = _sizes(base, family)
    blocks: Any = blocks_in(adapter, modes, sizes, family)
    tokens = tokens_in(path, adapter, family, tied=sizes.text.tied, instead=instead(path))
    if found.record is not None:
        check_record(path, found.record, blocks, tokens)
    check_copies(path, adapter, Towers(**modes, **blocks), slots, family)
    target = lora_target(path, adapter, modes, blocks, sizes, family)
    lora = {"lora_rank": rank, "lora_alpha": adapter.settings["lora_alpha"], "lora_target": target}
    settings = {**modes, **lora, **variants, **_quantised(path, found.record)}
    return {"settings": settings, "blocks": blocks, "tokens": tokens}


def _quantised(path: str, record: RunRecord | None) -> dict[str, Any]:
    """The flags that quantise a base as that of an adapter was; {} if it was not, or nothing says so."""
    quantisation = quantisation_of(path, record)
    return {} if quantisation is None else settings_of(quantisation)


def _sizes(base: Path, family: Family) -> Sizes:
    config: Any = family.plain_config(read_json(base / "config.json"), where=str(base))
    if config is None:
        from vlft.model.load import load_config  # imports transformers

        config, _ = load_config(base)
    return family.sizes(config)


def _whole(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)

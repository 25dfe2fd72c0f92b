"""Read an adapter folder from plain peft or another kit: tensors under today's module names, and settings.

Most published adapters of Qwen2-VL have the module names of transformers before 4.52, and some kits leave weights that
were trained in full in files beside the adapter. This module reads all of them or refuses them by name; it ignores
nothing silently. It reads headers and no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.checkpoint.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, module_name
from vlft.checkpoint.token_rows import PREFIX, ROWS, TokenRows, token_rows
from vlft.errors import CheckpointError
from vlft.families import Family
from vlft.model_files import read_json, slots_in, some_of, stored_slots

_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
#: What peft's live model and a raw dump of it add to the name of DoRA's vector; peft's own files leave it out.
_MAGNITUDE = re.compile(r"(?<=\.lora_magnitude_vector)(\.default)?(\.weight)?$")
#: Parts that wrappers of training (FSDP, torch.compile, DeepSpeed, peft's adapter name) add to a parameter's name.
_WRAPPERS = re.compile(
    r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|modules_to_save(\.default)?|base_layer)\."
    r"|(?<=\.lora_[AB])\.default(?=\.)|^module\."
)
#: Files that trainers write for resuming; they hold no weights of the adapter.
_STATES = re.compile(
    r"(training_args|optimizer\w*|scheduler|scaler)\.(bin|pt)|rng_state\w*\.pth|random_states_\d+\.pkl|latest"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_WEIGHTS = (".gguf", ".onnx", ".h5", ".msgpack", ".npz")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two matrices of one LoRA module: names in the adapter file, rank, alpha, and with DoRA the vector's name."""

    a: str
    b: str
    rank: int
    alpha: float
    magnitude: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all its tensors in the adapter file: A, B and DoRA's vector."""
        return (self.a, self.b, *([self.magnitude] if self.magnitude else []))


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The contents of an adapter folder.

    Attributes:
        folder: its path.
        settings: adapter_config.json as written.
        keys: name in peft's live model today (starts with `base_model.model.`) -> name in the adapter file.
        shapes: name in the adapter file -> shape.
        copies: parameter of the model -> file beside the adapter, and name in that file; another kit trained these
            weights in full.
        notes: for the user, on how the folder was read.
    """

    folder: Path
    settings: dict[str, Any]
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    copies: dict[str, tuple[Path, str]]
    notes: tuple[str, ...]

    @property
    def file(self) -> Path:
        """The adapter's own weights."""
        return self.folder / ADAPTER_WEIGHTS

    @property
    def renamed(self) -> bool:
        """Whether names in the file differ from those of peft's live model."""
        return any(live != _without_base_layer(stored) for live, stored in self.keys.items())

    def pairs(self) -> dict[str, Pair]:
        """Module -> its LoRA matrices, for every complete pair."""
        magnitudes = self.magnitudes()
        return {
            module: Pair(a=a, b=b, rank=rank, alpha=alpha, magnitude=magnitudes.get(module))
            for module, (a, b) in self.matrices().items()
            for rank, alpha in [self._rank_and_alpha(module, a)]
        }

    def matrices(self) -> dict[str, tuple[str, str]]:
        """Module -> names of A and B in the file, for every complete pair. Needs no peft."""
        a, b = (self._parts(f"lora_{side}.weight") for side in "AB")
        return {module: (a[module], b[module]) for module in a if module in b}

    def magnitudes(self) -> dict[str, str]:
        """Module -> name of DoRA's vector in the file; empty for an adapter without DoRA."""
        return self._parts("lora_magnitude_vector") if self.settings.get("use_dora") else {}

    def _parts(self, part: str) -> dict[str, str]:
        found = ((_LORA.fullmatch(live.removeprefix(PREFIX)), stored) for live, stored in self.keys.items())
        return {match["module"]: stored for match, stored in found if match is not None and match["part"] == part}

    def _rank_and_alpha(self, module: str, stored: str) -> tuple[int, float]:
        """Rank and alpha of a module: the value of the first matching pattern, else the common value.

        peft's own function matches the patterns, against today's name of the module and its name in the file.
        """
        from peft.utils.other import get_pattern_key

        names = [_bare(stored).partition(".lora_")[0], module]
        found: list[Any] = []
        for patterns, common in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            values: Mapping[str, Any] = self.settings.get(patterns) or {}
            keys = [key for name in names if (key := get_pattern_key(list(values), name)) in values]
            found.append(values[keys[0]] if keys else self.settings[common])
        return found[0], found[1]

    def token_rows(self, family: Family) -> dict[str, TokenRows]:
        """Embedding or head (the name of its weight) -> the rows that peft trained for some tokens.

        Raises:
            CheckpointError: adapter_config.json does not say which tokens these are.
        """
        return token_rows(self.folder / ADAPTER_CONFIG, self.settings, self.keys, self.shapes, family)

    def owner(self, parameter: str, family: Family) -> str | None:
        """The module of `modules_to_save` that holds a parameter; None if there is none."""
        wanted = self.settings.get("modules_to_save") or ()
        parts = parameter.split(".")
        for end in range(1, len(parts)):
            name = ".".join(parts[:end])
            spellings = (name, family.published_name(f"{name}.").rstrip("."))
            if any(spelling.endswith(one) for spelling in spellings for one in wanted):
                return name
        return None

    def embeddings(self, family: Family) -> dict[str, str]:
        """Embedding and head that peft saved without training them: name -> name in the file."""
        bare = {live.removeprefix(PREFIX): stored for live, stored in self.keys.items()}
        return {name: bare[name] for name in family.ends if name in bare and self.owner(name, family) is None}

    def replaced(self, family: Family) -> dict[str, tuple[Path, str]]:
        """Parameters of the base that get another value outside peft's modules -> file, and name in that file."""
        return self.copies | {name: (self.file, key) for name, key in self.embeddings(family).items()}

    def settings_today(self, family: Family) -> dict[str, Any]:
        """The settings with which peft makes modules for `keys`: every module by its full name today."""
        pairs = self.pairs()
        rows = self.token_rows(family)
        others = [live for live in self.keys if ".lora_" not in live and ROWS not in live]
        saved = {self.owner(live.removeprefix(PREFIX), family) for live in others}
        idle = ("exclude_modules", "layers_to_transform", "layers_pattern")
        return {key: value for key, value in self.settings.items() if key not in idle} | {
            "target_modules": sorted(pairs),
            "rank_pattern": {re.escape(module): pair.rank for module, pair in pairs.items()},
            "alpha_pattern": {re.escape(module): pair.alpha for module, pair in pairs.items()},
            "modules_to_save": sorted(filter(None, saved)) or None,
            "init_lora_weights": True,
            "inference_mode": True,
            "trainable_token_indices": {name.removesuffix(".weight"): list(one.ids) for name, one in rows.items()}
            or None,
        }


def read_adapter(folder: Path, base: Path, family: Family) -> Adapter:
    """Read an adapter folder.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        base: the model folder of its base.
        family: of the base.

    Raises:
        CheckpointError: a file is incomplete, two tensors have the same name, or there are weights beside the adapter
            that cannot be read or are no part of the base.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    _check_numbers(settings, folder / ADAPTER_CONFIG)
    shapes = {name: slot.shape for name, slot in slots_in(folder / ADAPTER_WEIGHTS).items()}
    keys = {PREFIX + _today(name, family): name for name in shapes}
    if len(keys) != len(shapes):
        twice = sorted(shapes.keys() - set(keys.values()))
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: holds the same tensor under two names: {twice[0]}.")
    notes = []
    if changed := [name for live, name in keys.items() if live != _without_base_layer(name)]:
        example = next(live for live, name in keys.items() if name == changed[0])
        notes.append(
            f"{ADAPTER_WEIGHTS}: {len(changed)} of {len(keys)} tensors have names of another version of transformers "
            f"or of a wrapper, and were read under today's names, e.g. {changed[0]} as {example}"
        )
    _refuse_other_vocabulary(folder, keys, shapes, base, family)
    copies, more = _weights_beside(folder, base, family)
    return Adapter(folder=folder, settings=settings, keys=keys, shapes=shapes, copies=copies, notes=(*notes, *more))


def _check_numbers(settings: Mapping[str, Any], where: Path) -> None:
    """Refuse an adapter whose scaling is unknown."""
    if settings.get("peft_type") != "LORA":
        return
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float) or isinstance(settings.get(name), bool):
            raise CheckpointError(
                f"{where}: {name} is {settings.get(name)!r}, expected a number: the adapter's scaling is unknown. "
                "Copy the file again."
            )


def _refuse_other_vocabulary(
    folder: Path, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], base: Path, family: Family
) -> None:
    """Refuse an embedding or head with another number of rows than the base's."""
    saved = {name: keys[PREFIX + name] for name in family.ends if PREFIX + name in keys}
    if not saved:
        return
    of_base = {module_name(family, name): slot.shape for name, slot in stored_slots(base).items()}
    for name, key in saved.items():
        found, wanted = shapes[key], of_base.get(name, of_base.get(family.embedding, ()))
        if len(found) == len(wanted) and found[0] != wanted[0] and found[1:] == wanted[1:]:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: {key} has {found[0]:,} rows, the base's {name} {wanted[0]:,}: the "
                "vocabulary was resized for this adapter. Resize the base in the same way (transformers: "
                f"model.resize_token_embeddings({found[0]}), then save_pretrained, with the adapter's tokenizer), and "
                "pass it as --base_model."
            )


def _without_base_layer(name: str) -> str:
    """A name without `base_layer`, peft's name for a weight that it adapts; peft saves the weight of an embedding."""
    return name.replace(".base_layer.", ".")


def _bare(name: str) -> str:
    """A parameter's name without the parts that wrappers and peft add."""
    name = _WRAPPERS.sub("", name)
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def _today(name: str, family: Family) -> str:
    """Today's name, in transformers' modules, of a parameter of a saved model."""
    return module_name(family, _MAGNITUDE.sub("", _bare(name)))


def _weights_beside(folder: Path, base: Path, family: Family) -> tuple[dict[str, tuple[Path, str]], list[str]]:
    """Weights in files beside the adapter: the parameters they replace, and notes for the user.

    Raises:
        CheckpointError: names a file that cannot be read, or whose tensors are no part of the base.
    """
    copies: dict[str, tuple[Path, str]] = {}
    notes: list[str] = []
    unused: list[str] = []
    pickles: list[str] = []
    stored: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name.startswith(("global_step", "pytorch_model_fsdp", "optimizer_")):
                unused.append(f"{path.name}/")
        elif path.name == ADAPTER_WEIGHTS or _STATES.fullmatch(path.name):
            continue
        elif path.name == "adapter_model.bin" or path.suffix in _OTHER_WEIGHTS:
            unused.append(path.name)
        elif path.suffix in _PICKLES:
            pickles.append(path.name)
        elif path.suffix == ".safetensors":
            if not stored:
                stored = {module_name(family, name): slot.shape for name, slot in stored_slots(base).items()}
            found = _copies_in(path, stored, family)
            if twice := found.keys() & copies.keys():
                other = copies[min(twice)][0].name
                raise CheckpointError(f"{path}: holds {min(twice)}, and so does {other}. Keep one of the two files.")
            copies |= found
            notes.append(f"{path.name}: {len(found)} tensors that were trained in full replace those of the base")
    if pickles:
        raise CheckpointError(
            f"{folder}: there are pickled weights beside the adapter: {some_of(pickles)}. A pickle runs code when "
            f"opened and is not read. {convert(folder / pickles[0])} To leave them out, move them out of the folder."
        )
    if unused:
        notes.append(f"not used, because the adapter is {ADAPTER_WEIGHTS}: {some_of(unused)}")
    return copies, notes


def convert(file: Path) -> str:
    """How the user turns a pickle of tensors into safetensors without running code in the pickle."""
    return (
        'Write it as safetensors: python -c "import torch; from safetensors.torch import save_file; '
        f"save_file({{k: v.clone().contiguous() for k, v in torch.load('{file}', map_location='cpu', "
        f"weights_only=True).items()}}, '{file.with_suffix('.safetensors')}')\" and move the pickle away."
    )


def _copies_in(path: Path, stored: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, tuple[Path, str]]:
    slots = slots_in(path)
    found = {_today(name, family): (path, name) for name in slots}
    known = stored.keys() | ({family.head} if family.embedding in stored else set())
    strangers = [name for live, (_, name) in found.items() if live not in known]
    if strangers or len(found) != len(slots):
        raise CheckpointError(
            f"{path}: {len(strangers) or len(slots) - len(found)} of its {len(slots)} tensors are no part of "
            f"{family.label}, or appear twice: {some_of(strangers or slots)}. Their purpose is unknown. "
            "Move the file out of the folder to leave them out."
        )
    for live, (_, name) in found.items():
        wanted = stored.get(live, stored.get(family.embedding))
        if slots[name].shape != wanted:
            raise CheckpointError(
                f"{path}: {name} is {list(slots[name].shape)}, the base's {live} is {list(wanted or ())}. Is this the "
                "base it was trained on? Pass the right one as --base_model."
            )
    return found

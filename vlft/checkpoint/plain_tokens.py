"""A base's tokenizer and chat template, read by the packages tokenizers and jinja2 alone.

transformers builds the tokenizer of Qwen models from vocabulary, merges and added tokens, and sets all else itself. So
a tokenizer.json is read here only if it states the same as transformers sets.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from vlft.model_files import read_json, tokenizer_settings

#: Class in transformers -> the expression by which it splits a text into words.
_SPLITS = {
    "Qwen2Tokenizer": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
        r"|\s+"
    ),
    "Qwen3_5Tokenizer": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
}
#: The class that the files of later families may name instead of their own. transformers 5.23 then takes their own; for
#: 5.17 `vlft.model.load` does.
_NAMED = "Qwen2Tokenizer"
#: Settings of the model in tokenizer.json that transformers leaves at these values.
_MODEL = {"type": ("BPE",), "dropout": (None,), "byte_fallback": (False, None), "ignore_merges": (False, None)}
_NOT_READ = ("add_prefix_space", "split_special_tokens", "auto_map")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, kw_only=True)
class PlainTokenizer:
    """The methods and attributes of a stock fast tokenizer that vlft uses.

    Attributes:
        backend_tokenizer: of the package tokenizers.
        special_tokens_map: name -> token.
        chat_template: as text, or None.
    """

    backend_tokenizer: Tokenizer
    special_tokens_map: Mapping[str, str]
    chat_template: str | None

    is_fast = True
    split_special_tokens = False  # `_NOT_READ`

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __call__(
        self, text: str | Sequence[str], *, add_special_tokens: bool, return_offsets_mapping: bool = False
    ) -> SimpleNamespace:
        """Tokenise one text or several, as a stock tokenizer does."""
        texts = [text] if isinstance(text, str) else list(text)
        found = self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        ids, offsets = [one.ids for one in found], [one.offsets for one in found]
        one_text = isinstance(text, str)
        return SimpleNamespace(
            input_ids=ids[0] if one_text else ids, offset_mapping=offsets[0] if one_text else offsets
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Return the text of tokens. Spaces are never cleaned up."""
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Return the id of a token."""
        return self.backend_tokenizer.token_to_id(token)

    def apply_chat_template(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        *,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool = False,
        **arguments: Any,
    ) -> list[str]:
        """Render conversations as text.

        Args:
            arguments: of the template, such as `enable_thinking`.

        Raises:
            TemplateError: the template is wrong, or refuses a conversation.
        """
        template = _compiled(chat_template)
        return [
            template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens_map,
                **arguments,
            )
            for messages in conversations
        ]


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """Compile a chat template, in the same sandbox as transformers does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def read_template(folder: Path, of_tokenizer: str | None) -> tuple[str | None, bool]:
    """Return the chat template of a folder, and whether it renders here as in transformers."""
    jinja, old = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja.is_file():
        template: Any = jinja.read_text(encoding="utf-8")
    elif old.is_file():
        template = read_json(old).get("chat_template")
    else:
        template = None
    used = template if template is not None else of_tokenizer
    ours = isinstance(used, str) and not re.search(r"\{%-?\s*generation|strftime_now", used)
    return template, ours and not (folder / "additional_chat_templates").exists()


def read_tokenizer(folder: Path, wanted: str) -> PlainTokenizer | None:
    """Read a Qwen tokenizer; None if its files have a form that only transformers can read.

    Args:
        folder: of the model.
        wanted: the class of its family in transformers.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if not all((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    config = read_json(folder / "tokenizer_config.json")
    named_class = str(config.get("tokenizer_class")).removesuffix("Fast")
    if named_class not in (wanted, _NAMED) or any(config.get(name) for name in _NOT_READ):
        return None
    if not isinstance(config.get("chat_template"), str | None):
        return None
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        found, _ = tokenizer_settings(text)
        backend = Tokenizer.from_str(text)
    except Exception:  # noqa: BLE001 - the package raises plain Exception; transformers then says what is wrong
        return None
    if not _as_set(found, _SPLITS[wanted]):
        return None
    named = {name: _content(config[name]) for name in NAMED if config.get(name) is not None}
    if "unk_token" not in config:
        named["unk_token"] = "<|endoftext|>"  # the default of the class
    if "eos_token" not in named or "pad_token" not in named:
        return None
    added = {one["content"]: one for one in found.get("added_tokens", ())}
    if not all(token in added for token in (*named.values(), *_more_tokens(config, folder))):
        return None
    if not _listed_equally(added, config.get("added_tokens_decoder") or {}):
        return None
    if any(backend.token_to_id(text) != one.get("id") for text, one in added.items()):
        return None  # the package numbers added tokens in their order, and transformers by their ids
    backend.no_truncation()
    backend.no_padding()
    return PlainTokenizer(
        backend_tokenizer=backend, special_tokens_map=named, chat_template=config.get("chat_template")
    )


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _as_set(found: Mapping[str, Any], split: str) -> bool:
    """Whether a tokenizer.json states what transformers sets."""
    model = found.get("model")
    if not isinstance(model, dict) or not isinstance(found.get("pre_tokenizer"), dict):
        return False
    parts = found["pre_tokenizer"].get("pretokenizers", [])
    plain = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    same = found.get("normalizer") == {"type": "NFC"} and {**found["pre_tokenizer"], "pretokenizers": plain} == {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    }
    return same and all(model.get(name) in allowed for name, allowed in _MODEL.items() if name in model)


def _more_tokens(config: Mapping[str, Any], folder: Path) -> list[Any]:
    """Return the special tokens that other files name."""
    lists = (config.get("extra_special_tokens") or [], config.get("additional_special_tokens") or [])
    found = [_content(token) for one in lists for token in (one.values() if isinstance(one, dict) else one)]
    if (folder / "added_tokens.json").is_file():
        found += list(read_json(folder / "added_tokens.json"))
    return found


def _listed_equally(added: Mapping[str, Mapping[str, Any]], listed: Mapping[str, Any]) -> bool:
    """Whether tokenizer_config.json lists the added tokens as tokenizer.json does."""
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    for place, token in listed.items():
        ours = added.get(_content(token))
        if ours is None or str(ours.get("id")) != place or any(ours.get(key) != token.get(key) for key in keys):
            return False
    return True

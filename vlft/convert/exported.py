"""The result of an export, and the settings with which another trainer reads it as vlft would train it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlft.config.thinking import ENABLE
from vlft.convert.export_rows import Kind
from vlft.errors import BadRow
from vlft.text import counted

DATA, RECORD = "data.parquet", "export.json"

#: Modules of a Qwen-VL that llm-compressor must not quantise. Its own examples write `re:visual.*`, which protects
#: nothing where transformers 5 names the tower `model.visual` (0.14: patterns match from the start of a name).
IGNORE = ("re:.*lm_head", "re:.*visual.*")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export.

    Attributes:
        kind: for which trainer.
        out: the folder.
        read: rows read.
        rows: rows written.
        samples: rows of the file: for verl and TRL one for each trained answer of a row, for calibration one per row.
        skipped: the other rows, each with its reason.
        pictures: pictures written.
        max_prompt_length: tokens of the longest prompt, with its pictures, as vlft counts them for training.
        max_response_length: tokens of the longest answer, with the token that ends it.
        image_min_pixels: limit of the pixels of a picture.
        image_max_pixels: likewise.
        held_out: rows that `--eval_split` holds out of the data, which are not exported.
        max_completion_length: with `--method grpo`, most tokens of a completion; else 0.
        arguments: of the chat template, as text of JSON -> samples that were exported with them.
        notes: what else differs between the rows and the file; sentences without a full stop.
    """

    kind: Kind
    out: str
    read: int
    rows: int
    samples: int
    skipped: tuple[BadRow, ...]
    pictures: int
    max_prompt_length: int
    max_response_length: int
    image_min_pixels: int
    image_max_pixels: int
    held_out: int = 0
    max_completion_length: int = 0
    arguments: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def next_lines(self) -> list[str]:
        """What to do with the file: settings of the trainer that agree with what was exported."""
        path = str(Path(self.out) / DATA)
        data = shlex.quote(path)
        pixels = f"min_pixels {self.image_min_pixels}, max_pixels {self.image_max_pixels}"
        if self.kind == "verl":
            response = self.max_completion_length or self.max_response_length
            settings = "".join(f" +data.apply_chat_template_kwargs.{name}={value}" for name, value in self._common)
            return [
                f"verl: data.train_files={data} data.image_key=images data.prompt_key=prompt "
                f"data.max_prompt_length={self.max_prompt_length} data.max_response_length={response} "
                f"data.filter_overlong_prompts=False data.truncation=error{settings}",
                f"pixels: each picture carries {pixels}, or the limits of its row, which verl passes to qwen-vl-utils",
                *self._lines_on_thoughts("verl has"),
            ]
        if self.kind == "trl":
            limit = "max_length=None, because cutting a row cuts its pictures"
            if self.max_completion_length:
                limit = f"max_completion_length={self.max_completion_length} in GRPOConfig"
            return [
                f'TRL: load_dataset("parquet", data_files={path!r}, split="train")',
                f"length: the longest prompt has {self.max_prompt_length:,} tokens, the longest answer "
                f"{self.max_response_length:,}; set {limit}",
                f"pixels: load the processor from a run folder, or with {pixels}",
                *self._lines_for_templates(),
            ]
        return [
            f"llm-compressor: {data} has `messages`, for the processor's chat template, and `images`",
            f"ignore: {list(IGNORE)}, which keeps the vision tower and the head in 16 bits",
            f"pixels: load the processor from a run folder, or with {pixels}",
            *(["chat template: pass each row's `chat_template_kwargs`, as trained"] if self.arguments else []),
        ]

    @property
    def _common(self) -> list[tuple[str, bool]]:
        """The arguments of the chat template that all samples share."""
        found = [json.loads(text) for text in self.arguments]
        return [(name, value) for name, value in (found[0] if found else {}).items() if self._shared(name)]

    def _shared(self, name: str) -> bool:
        return len({json.loads(text)[name] for text in self.arguments}) == 1

    def _lines_for_templates(self) -> list[str]:
        if not self.arguments:
            return []
        common = dict(self._common)
        grpo = f". GRPOTrainer does not read them: GRPOConfig(chat_template_kwargs={common!r})" if common else ""
        return [
            "chat template: each row has `chat_template_kwargs`; set remove_unused_columns=False, or SFTTrainer drops "
            f"them{grpo}",
            *self._lines_on_thoughts("GRPOTrainer has"),
        ]

    def _lines_on_thoughts(self, who: str) -> list[str]:
        if not self.arguments or self._shared_or_absent(ENABLE):
            return []
        on = sum(count for text, count in self.arguments.items() if json.loads(text)[ENABLE])
        return [
            f"thoughts: {counted(on, 'answer')} with thoughts, {counted(self.samples - on, 'answer')} without. {who} "
            f"one {ENABLE} for all rows, so export and train them apart"
        ]

    def _shared_or_absent(self, name: str) -> bool:
        return all(name not in json.loads(text) for text in self.arguments) or self._shared(name)

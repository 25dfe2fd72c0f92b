"""The supported forms of rows: which keys hold the conversation. One table, which is also shown in data/README.md.

    python -m vlft.data.rows.forms data/README.md        writes the table there

To support the form of another kit, add it to `FORMS`. `vlft.data.rows.turns` reads the turns. The other keys
(pictures, system turn, budgets) are the same in all forms, and `vlft.data.rows.normalise` reads them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlft.data.rows import pairs
from vlft.data.rows.conversation import alpaca, conversation, instruction, question, two
from vlft.data.rows.turns import RawTurn
from vlft.errors import RowRef


@dataclass(frozen=True, kw_only=True)
class AnyForm:
    """A form of rows: which keys hold the conversation.

    Attributes:
        kits: the kits that write this form.
        keys: a row has this form if it has all of these keys.
        example: an example row.
        remark: how the row is read.
        untagged: the kit has no tags, so that files belong to the beginning of the first human turn.
        beside: further keys of the form, which are optional.
    """

    kits: str
    keys: tuple[str, ...]
    example: dict
    remark: str = ""
    untagged: bool = False
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Form(AnyForm):
    """A form of rows with one answer to learn.

    Attributes:
        read: function from a row to its turns.
    """

    read: Callable[[RowRef, dict], list[RawTurn]]

    @property
    def name(self) -> str:
        """The key that messages use to name the conversation."""
        return self.keys[-1]


@dataclass(frozen=True, kw_only=True)
class PairForm(AnyForm):
    """A form of preference rows.

    Attributes:
        read: function from a row to its turns and its rejected answers.
        fits: whether the values of its keys may have this form.
    """

    read: pairs.Reader
    fits: Callable[[dict], bool] = lambda raw: True

    @property
    def name(self) -> str:
        """The key that messages use to name the conversation."""
        return self.keys[0]


def form_of(raw: dict) -> Form | None:
    """Return the first form whose keys the row has. None if the row has no conversation in a supported form."""
    return next((form for form in FORMS if _has(raw, form)), None)


def pair_form_of(raw: dict) -> PairForm | None:
    """Return the first form of preference rows whose keys the row has. None if the row has not two answers."""
    found = [form for form in PAIR_FORMS if _has(raw, form) and form.fits(raw)]
    # In a table every row has every column: a column with an answer wins.
    return next((form for form in found if raw[form.keys[-1]] not in ("", [])), found[0] if found else None)


def _has(raw: dict, form: AnyForm) -> bool:
    return all(raw.get(key) is not None for key in form.keys)


_QUESTION, _ANSWER = "<image>What is it?", "A cat."

# The first form that fits is read; keys of other forms are then a warning.
FORMS: tuple[Form, ...] = (
    Form(
        kits="LLaVA, ShareGPT, Qwen2-VL-Finetune, LLaMA-Factory `sharegpt`, InternVL",
        keys=("conversations",),
        read=conversation("conversations"),
        example={
            "image": "cat.jpg",
            "conversations": [{"from": "human", "value": _QUESTION}, {"from": "gpt", "value": _ANSWER}],
        },
        remark="`role` and `content` are other names. A list, a JSON string, or `{from: [...], value: [...]}`",
    ),
    Form(
        kits="OpenAI, ms-swift, TRL, axolotl, LLaMA-Factory `openai` and v1",
        keys=("messages",),
        read=conversation("messages"),
        example={
            "images": ["cat.jpg"],
            "messages": [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}],
        },
        remark="`content` may be a list of [parts](#parts)",
    ),
    Form(
        kits="ms-swift's older ShareGPT",
        keys=("conversation",),
        read=conversation("conversation"),
        example={"images": ["cat.jpg"], "conversation": [{"human": _QUESTION, "assistant": _ANSWER}]},
        remark="pairs, or turns as above",
    ),
    Form(
        kits="the_cauldron, FineVision",
        keys=("texts",),
        read=conversation("texts"),
        example={"images": ["cat.jpg"], "texts": [{"user": "What is it?", "assistant": _ANSWER}]},
        remark="has no tags: the pictures come before the first question",
        untagged=True,
    ),
    Form(
        kits="TRL",
        keys=("prompt", "completion"),
        read=two("prompt", "completion"),
        example={
            "images": ["cat.jpg"],
            "prompt": [{"role": "user", "content": "What is it?"}],
            "completion": [{"role": "assistant", "content": _ANSWER}],
        },
        remark="two strings, or two lists of turns; without tags, pictures come before the first question, as in TRL",
        untagged=True,
    ),
    Form(
        kits="LLaMA-Factory `alpaca`",
        keys=("instruction", "output"),
        read=alpaca,
        example={"images": ["cat.jpg"], "instruction": _QUESTION, "input": "", "output": _ANSWER, "history": []},
        remark="`input` follows on a new line; `history` holds earlier `[question, answer]` pairs, also trained",
        beside=("input", "history"),
    ),
    Form(
        kits="",
        keys=("input", "output"),
        read=alpaca,
        example={"images": ["cat.jpg"], "input": _QUESTION, "output": _ANSWER},
        beside=("history",),
    ),
    Form(
        kits="ms-swift",
        keys=("query", "response"),
        read=two("query", "response"),
        example={"images": [{"path": "cat.jpg"}], "query": _QUESTION, "response": _ANSWER, "history": []},
        remark="`history` as above",
        beside=("history",),
    ),
    Form(
        kits="many data sets",
        keys=("prompt", "response"),
        read=two("prompt", "response"),
        example={"image": "cat.jpg", "prompt": _QUESTION, "response": _ANSWER},
    ),
    Form(
        kits="VQA data sets",
        keys=("question", "answer"),
        read=two("question", "answer"),
        example={"image": "cat.jpg", "question": "What is it?", "answer": _ANSWER},
        remark="without tags, pictures come before the question",
        untagged=True,
    ),
)
KEYS = frozenset(key for form in FORMS for key in (*form.keys, *form.beside))

_OTHER = "A dog."
_WHOLE_OTHER = [{"role": "assistant", "content": _OTHER}]
_ANSWERS = (pairs.CHOSEN, pairs.REJECTED)

# The first form that fits is read.
PAIR_FORMS: tuple[PairForm, ...] = (
    PairForm(
        kits="Qwen2-VL-Finetune, TRL",
        keys=("prompt", *_ANSWERS),
        read=pairs.after(question("prompt")),
        example={"image": "cat.jpg", "prompt": _QUESTION, "chosen": _ANSWER, "rejected": _OTHER},
        remark="strings, turns or lists of turns; without tags, pictures come before the first question, as in TRL",
        untagged=True,
        beside=("history",),
    ),
    PairForm(
        kits="LLaMA-Factory `sharegpt`",
        keys=("conversations", *_ANSWERS),
        read=pairs.after(conversation("conversations")),
        example={
            "images": ["cat.jpg"],
            "conversations": [{"from": "human", "value": _QUESTION}],
            "chosen": {"from": "gpt", "value": _ANSWER},
            "rejected": {"from": "gpt", "value": _OTHER},
        },
        remark="the conversation ends with a question",
    ),
    PairForm(
        kits="LLaMA-Factory `openai`",
        keys=("messages", *_ANSWERS),
        read=pairs.after(conversation("messages")),
        example={
            "images": ["cat.jpg"],
            "messages": [{"role": "user", "content": _QUESTION}],
            "chosen": {"role": "assistant", "content": _ANSWER},
            "rejected": [{"role": "assistant", "content": _OTHER}],
        },
        remark="several turns under `rejected` are several answers",
    ),
    PairForm(
        kits="RLAIF-V",
        keys=("question", *_ANSWERS),
        read=pairs.after(question("question")),
        example={"image": "cat.jpg", "question": "What is it?", "chosen": _ANSWER, "rejected": [_OTHER]},
        remark="without tags, pictures come before the question",
        untagged=True,
        beside=("history",),
    ),
    *(
        PairForm(
            kits="LLaMA-Factory `alpaca`" if key == "instruction" else "",
            keys=(key, *_ANSWERS),
            read=pairs.after(instruction if key != "query" else question("query")),
            example={"images": ["cat.jpg"], key: _QUESTION, "chosen": _ANSWER, "rejected": _OTHER},
            beside=("input", "history") if key == "instruction" else ("history",),
        )
        for key in ("instruction", "input", "query")
    ),
    PairForm(
        kits="TRL",
        keys=_ANSWERS,
        read=pairs.whole,
        example={
            "images": ["cat.jpg"],
            "chosen": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": _ANSWER}],
            "rejected": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": _OTHER}],
        },
        remark="conversations that are equal up to their last answer; pictures as above",
        untagged=True,
    ),
    *(
        PairForm(
            kits="ms-swift" if form.keys in (("messages",), ("query", "response")) else "",
            keys=(*form.keys, key),
            read=pairs.before(form.read, key),
            example={**form.example, key: _OTHER if key == pairs.BESIDE_ANSWER[0] else _WHOLE_OTHER},
            remark="the last turn is the chosen answer" if form.keys == ("messages",) else "",
            untagged=form.untagged,
            beside=form.beside,
        )
        for form in FORMS
        for key in pairs.BESIDE_ANSWER
    ),
    PairForm(
        kits="RLHF-V",
        keys=("text",),
        read=pairs.in_json,
        fits=lambda raw: isinstance(raw["text"], dict) or str(raw["text"]).lstrip().startswith("{"),
        example={
            "image": "cat.jpg",
            "text": json.dumps({"question": "What is it?", "chosen": _ANSWER, "rejected": _OTHER}),
        },
        remark="JSON in a string; pictures come before the question",
        untagged=True,
    ),
)
PAIR_KEYS = frozenset(key for form in PAIR_FORMS for key in (*form.keys, *form.beside))

#: Name of the comments around a table in data/README.md -> its forms.
TABLES: dict[str, Sequence[AnyForm]] = {
    "forms": FORMS,
    "preference forms": [form for form in PAIR_FORMS if form.kits],
}


def table(forms: Sequence[AnyForm]) -> str:
    """Return a table of forms as it is in data/README.md."""
    lines = ["| rows of | look like this | |", "| --- | --- | --- |"]
    for form in forms:
        example = json.dumps(form.example, ensure_ascii=False).replace("|", "\\|")
        lines.append(f"| {form.kits or 'others'} | `{example}` | {form.remark} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """Return a README with its tables replaced by the current ones."""
    for name, forms in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table(forms)}\n{end}{after}"
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")

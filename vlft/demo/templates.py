"""Chat templates of tiny models. They render conversations as the published templates do; tools are left out.

Differences that matter for training:

- Qwen2-VL and Qwen2.5-VL add a default system turn.
- Qwen3-VL adds none. Its Thinking models begin every answer with `<think>`, and drop the thoughts of earlier answers.
- Qwen3.5 trims every text, writes thoughts before the answers that follow the last question, drops earlier thoughts,
  and takes `enable_thinking`. Models from 4B on think by default, smaller ones do not.
- Qwen3.6 also takes `preserve_thinking`, which keeps earlier thoughts.
- Qwen3.8 keeps them by default, and states the effort of reasoning in the system turn if it thinks. It does not look
  for thoughts in the text of an answer: they must be in `reasoning_content`.
"""

from __future__ import annotations

from collections.abc import Mapping

_MEDIA = (
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
)
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}" + _MEDIA + "{% endfor %}{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
_TURN = "<|im_start|>{{ message['role'] }}\n" + _CONTENT + "<|im_end|>\n"


def _plain(before: str = "") -> str:
    """Every turn as it is written."""
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return "{% for message in messages %}" + before + _TURN + "{% endfor %}" + prompt


#: Find the last question. What follows it is the current answer.
_LAST_QUESTION = (
    "{% set found = namespace(question=-1) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set found.question = loop.index0 %}{% endif %}{% endfor %}"
)
#: Find the thoughts of an answer in its text.
_IN_TEXT = (
    "{% if '</think>' in text %}"
    "{% set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
)
_GIVEN = (
    "{% set thoughts = '' %}{% if message['reasoning_content'] is string %}"
    "{% set thoughts = message['reasoning_content'] %}"
)


def _thoughts(*, find: str, shown: str, clean: str, head: str = "", prompt: str) -> str:
    """Answers with thoughts.

    Args:
        find: sets `thoughts` and `text` of an answer that has no `reasoning_content`.
        shown: condition under which an answer is rendered with its thoughts.
        clean: filter of every text.
        head: text before the first turn; may set `effort`, text of the system turn.
        prompt: end of the generation prompt.
    """
    system = (
        "{% if message['role'] == 'system' %}{% if not loop.first %}"
        "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
        "{% if '<|vision_start|>' in text %}"
        "{{ raise_exception('System message cannot contain images.') }}{% endif %}"
        "<|im_start|>system\n{{ effort ~ '\n\n' if effort else '' }}{{ text }}<|im_end|>\n"
    )
    answer = (
        "{% elif message['role'] == 'assistant' %}" + _GIVEN + find + "{% endif %}"
        "<|im_start|>assistant\n{% if " + shown + " %}<think>\n{{ thoughts.strip() }}\n</think>\n\n{% endif %}"
        "{{ text }}<|im_end|>\n"
    )
    return (
        "{% set effort = '' %}"
        + head
        + _LAST_QUESTION
        + "{% if found.question < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}"
        + "{% if effort and messages[0]['role'] != 'system' %}<|im_start|>system\n{{ effort }}<|im_end|>\n{% endif %}"
        + "{% for message in messages %}{% set text %}"
        + _CONTENT
        + "{% endset %}{% set text = text"
        + clean
        + " %}"
        + system
        + answer
        + "{% else %}<|im_start|>{{ message['role'] }}\n{{ text }}<|im_end|>\n{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n"
        + prompt
        + "{% endif %}"
    )


_FIND = "{% else %}" + _IN_TEXT
_LATER = "loop.index0 > found.question"
_EMPTY, _BEGUN = "<think>\n\n</think>\n\n", "<think>\n"
_ON = (
    "{% if enable_thinking is defined and enable_thinking is false %}" + _EMPTY + "{% else %}" + _BEGUN + "{% endif %}"
)
_OFF = (
    "{% if enable_thinking is defined and enable_thinking is true %}" + _BEGUN + "{% else %}" + _EMPTY + "{% endif %}"
)
_KEPT = "(preserve_thinking is defined and preserve_thinking is true) or "
_KEPT_BY_DEFAULT = "preserve_thinking is undefined or preserve_thinking is true or "
_EFFORT = (
    "{% if enable_thinking is undefined or enable_thinking is true %}"
    "{% set effort = 'Reasoning effort is set to ' ~ (reasoning_effort | default('xhigh')) ~ '.' %}{% endif %}"
)

#: Name of a kind of template -> template. `qwen3.5-small` is that of models up to 2B.
TEMPLATES: Mapping[str, str] = {
    "qwen2-vl": _plain(_DEFAULT_SYSTEM),
    "qwen3-vl": _plain(),
    "qwen3-vl-thinking": _thoughts(find=_FIND, shown=_LATER + " and (loop.last or thoughts)", clean="", prompt=_BEGUN),
    "qwen3.5": _thoughts(find=_FIND, shown=_LATER, clean=" | trim", prompt=_ON),
    "qwen3.5-small": _thoughts(find=_FIND, shown=_LATER, clean=" | trim", prompt=_OFF),
    "qwen3.6": _thoughts(find=_FIND, shown=_KEPT + _LATER, clean=" | trim", prompt=_ON),
    "qwen3.8": _thoughts(find="", shown=_KEPT_BY_DEFAULT + _LATER, clean=" | trim", head=_EFFORT, prompt=_ON),
}
#: `Family.chat` -> the template of its tiny model.
OF_CHAT: Mapping[str, str] = {
    "system": TEMPLATES["qwen2-vl"],
    "bare": TEMPLATES["qwen3-vl"],
    "thoughts": TEMPLATES["qwen3.5"],
}

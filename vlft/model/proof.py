"""Check that a loaded processor belongs to its model: tokens, chat template and patches.

transformers creates an empty tokenizer if files are missing (5.23), and it loads a processor of another model without
an error. Both would train on the wrong tokens, without a warning.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlft.errors import CheckpointError
from vlft.families import FAMILIES, Family, VisionSizes

#: Words, digits, punctuation, line breaks, and letters of two, three and four bytes (all in Unicode's form NFC, to
#: which Qwen's tokenizer normalises).
SENTENCE = "Don't panic: \"Zürich\" is 北京's 42nd twin,\n\tat 3.14 % (naïve) 🙂!\n\nOk?"
_ANSWER = "An answer, 17."


def prove(processor: Any, config: Any, family: Family, *, where: str | Path) -> None:
    """Refuse a processor that does not fit the model.

    Args:
        processor: as loaded.
        config: of the model.
        family: of the config.
        where: where it was loaded from, for messages.

    Raises:
        CheckpointError: a control token is not one token or not that of config.json, decoding does not restore a text,
            there are more tokens than the embedding has rows, the patch sizes differ, or the chat template is missing,
            cannot be rendered or drops text.
    """
    parts = ("tokenizer", "image_processor", "video_processor")
    if missing := [part for part in parts if getattr(processor, part, None) is None]:
        raise CheckpointError(
            f"{where}: {type(processor).__name__} has no {missing[0].replace('_', ' ')}, so it is not a processor of "
            f"{family.label}. Copy preprocessor_config.json and processor_config.json from the model you started from."
        )
    _prove_classes(processor, family, where)
    _prove_tokens(processor.tokenizer, config, family, where)
    _prove_patches(processor, family.sizes(config).vision, where)
    _prove_template(processor, family, where)


def _prove_classes(processor: Any, family: Family, where: str | Path) -> None:
    """Refuse the processor of another family, and every video processor that chooses frames or sizes in another way.

    The tokens of a video would differ from those that the model was trained on.
    """
    of_families = {one.processor_class for one in FAMILIES.values()}
    for attribute, part in (("processor_class", processor), ("video_processor_class", processor.video_processor)):
        found, wanted = type(part).__name__, getattr(family, attribute)
        if isinstance(part, SimpleNamespace):
            continue  # of `vlft.checkpoint.plain`, which opens only files that name the classes of the family
        if found != wanted and (part is not processor or found in of_families):
            raise CheckpointError(
                f"{where}: its {attribute.removesuffix('_class').replace('_', ' ')} is a {found}, {family.label} has a "
                f"{wanted}. Copy preprocessor_config.json, processor_config.json and video_preprocessor_config.json "
                "from the model you started from."
            )


def _prove_tokens(tokenizer: Any, config: Any, family: Family, where: str | Path) -> None:
    advice = "Copy tokenizer.json, vocab.json, merges.txt and tokenizer_config.json from the model you started from."
    for text in family.control_tokens:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise CheckpointError(
                f"{where}: its tokenizer makes {len(ids)} tokens of {text}, expected 1 (it has {len(tokenizer):,} "
                f"tokens in all). {advice}"
            )
    back = tokenizer.decode(
        tokenizer.encode(SENTENCE, add_special_tokens=False),
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    if back != SENTENCE:
        raise CheckpointError(
            f"{where}: its tokenizer loses text: {SENTENCE!r} comes back as {back!r} (it has {len(tokenizer):,} tokens "
            f"in all). {advice}"
        )
    rows = family.sizes(config).text.vocab
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"{where}: its tokenizer has {len(tokenizer):,} tokens, the model's embedding {rows:,} rows (vocab_size in "
            f"config.json), so some tokens have none. {advice}"
        )
    for setting, text in family.config_tokens.items():
        theirs, (ours,) = getattr(config, setting, None), tokenizer.encode(text, add_special_tokens=False)
        if theirs is not None and theirs != ours:
            raise CheckpointError(
                f"{where}: its tokenizer has {text} as token {ours}, {setting} in config.json is {theirs}: they "
                f"belong to different models. {advice}"
            )


def _prove_patches(processor: Any, vision: VisionSizes, where: str | Path) -> None:
    for part in ("image_processor", "video_processor"):
        for name, wanted in (
            ("patch_size", vision.patch),
            ("temporal_patch_size", vision.temporal),
            ("merge_size", vision.merge),
        ):
            found = getattr(getattr(processor, part), name, None)
            if found != wanted:
                raise CheckpointError(
                    f"{where}: {name} of its {part.replace('_', ' ')} is {found}, the model's vision_config has "
                    f"{wanted}: they belong to different models. Copy preprocessor_config.json, "
                    "processor_config.json and video_preprocessor_config.json from the model you started from."
                )


def _prove_template(processor: Any, family: Family, where: str | Path) -> None:
    template = processor.chat_template or processor.tokenizer.chat_template
    names = ("chat_template.jinja", "chat_template.json")
    file = next((name for name in names if Path(where, name).is_file()), "chat_template in tokenizer_config.json")
    advice = f"Copy {file if template else ' or '.join(names)} from the model you started from."
    if not template:
        raise CheckpointError(f"{where}: has no chat template, so conversations cannot be rendered. {advice}")
    with_picture: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": SENTENCE}]
    answer = {"role": "assistant", "content": _ANSWER}
    conversations = [[{"role": "user", "content": content}, answer] for content in (SENTENCE, with_picture)]
    try:
        plain, pictured = processor.tokenizer.apply_chat_template(conversations, chat_template=template, tokenize=False)
    except Exception as error:  # a template is a program by the base's author, and may raise anything
        line = f", line {error.lineno}" if hasattr(error, "lineno") else ""
        raise CheckpointError(
            f"{where}: its chat template in {file} cannot be rendered ({type(error).__name__}{line}: {error}). {advice}"
        ) from error
    lost = [text for text in (SENTENCE, _ANSWER, family.end_of_turn) if text not in plain or text not in pictured]
    lost += [] if family.image_pad in pictured else [family.image_pad]
    if lost:
        raise CheckpointError(
            f"{where}: its chat template in {file} leaves {lost[0]!r} out of a conversation that has it. {advice}"
        )

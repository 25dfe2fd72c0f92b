"""Build configs and processors of a family from its sizes, for models with random weights. Downloads nothing."""

from __future__ import annotations

from typing import Any

from vlft.families import Family, Shape


def media_processors(family: Family, least: int, most: int) -> tuple[Any, Any]:
    """A family's stock image and video processor.

    Args:
        family: of the model.
        least: fewest pixels of a picture and of a video frame, or of a clip.
        most: most pixels of a picture and of a video frame. A clip may have 8 times as many, if limits apply to clips.
    """
    import transformers

    mean, std = map(list, family.scaling)
    fixed = {"image_mean": mean, "image_std": std, **family.patch_sizes}
    clip = 8 * most if family.video_rule == "processor" else most
    image, video = (
        getattr(transformers, name)(size={"shortest_edge": least, "longest_edge": highest}, **fixed)
        for name, highest in ((family.image_processor_class, most), (family.video_processor_class, clip))
    )
    return image, video


def build_config(family: Family, shape: Shape, tokenizer: Any) -> Any:
    """transformers' config of a shape, with the control token ids of a tokenizer."""
    import transformers

    def token(text: str) -> int:
        return tokenizer.convert_tokens_to_ids(text)

    ends = {"bos_token_id": token(family.end_of_text), "eos_token_id": token(family.end_of_turn)}
    return getattr(transformers, family.config_class)(
        text_config={
            family.text_names.vocab: 64 * -(-len(tokenizer) // 64),
            **shape.text,
            "tie_word_embeddings": shape.tied,
            "pad_token_id": token(family.end_of_text),
            **ends,
        },
        vision_config=dict(shape.vision),
        tie_word_embeddings=shape.tied,
        **{name: token(text) for name, text in family.config_tokens.items()},
        **ends,
    )

"""The metrics by name, each with one line for people. Plain text: the parser's help reads it, so numpy is not imported.

`vlft.metrics.registry` finds the metric of a name.
"""

from __future__ import annotations

from collections.abc import Mapping

NAMES: Mapping[str, str] = {
    "exact_match": "share of answers that equal a right answer; only spaces around them are ignored",
    "accuracy": "share of right choices: a letter, an option's text, yes or no, in the usual phrasings",
    "anls": "similarity of short answers by edit distance, as in DocVQA; below 0.5 it counts 0",
    "vqa_accuracy": "agreement with people's answers, as in VQAv2; 3 people of 10 make an answer right",
    "bleu": "corpus BLEU of sacrebleu, 0 to 1",
    "rouge_l": "F1 of the longest common sequence of words",
    "cer": "character error rate: wrong characters per character of the right answers",
    "wer": "word error rate: wrong words per word of the right answers",
    "iou": "mean overlap of boxes; a box without a partner counts 0",
    "iou_hit_rate": "share of right boxes that a box of the answer overlaps by IoU 0.5 or more",
    "json_valid": "share of answers that are JSON, of rows whose right answer is JSON",
    "json_fields": "F1 of the fields of JSON answers: same place, same value",
    "story_grounding": "F1 of the boxes in a story's tables, as in StoryReasoning; matched within a picture",
    "story_grounding_precision": "share of the boxes in a story's tables that are right, as in StoryReasoning",
    "story_grounding_recall": "share of the right boxes that are in a story's tables, as in StoryReasoning",
    "story_consistency": "F1 of pairs of appearances that a story's tables give one character id across pictures",
    "story_tags": "share of ids in a story's tags that its tables, or the row's pictures, have",
}

#: The metrics without `--metric`. They need no extra package.
DEFAULT = ("exact_match", "rouge_l")

#: How a metric of the user is written.
OWN = "FILE.py:FUNCTION"

"""Find the metric of a name. Says what to do about a name that is unknown and a package that is missing.

Neighbours: `names` has the names and their lines; every other module has some metrics, in `METRICS`; `own` loads a
function of the user.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util

from vlft.errors import ConfigError
from vlft.metrics.case import Metric
from vlft.metrics.names import NAMES, OWN

#: Metric -> module of this folder. A new metric needs a line here and one in `NAMES`.
MODULES = {
    "exact_match": "wording",
    "anls": "wording",
    "rouge_l": "wording",
    "cer": "wording",
    "wer": "wording",
    "accuracy": "choices",
    "vqa_accuracy": "vqa",
    "bleu": "bleu",
    "iou": "overlap",
    "iou_hit_rate": "overlap",
    "json_valid": "fields",
    "json_fields": "fields",
    **dict.fromkeys(
        (
            *("story_grounding", "story_grounding_precision", "story_grounding_recall"),
            *("story_consistency", "story_tags"),
        ),
        "story",
    ),
}

#: Metric -> package that it needs.
PACKAGES = {"bleu": "sacrebleu"}

INSTALL = "pip install 'vlft[eval]'"

_JAVA = "Its reference implementation needs Java, and other ones give other figures"
#: Known names that are no metric here, with the reason and what to use.
REFUSED = {
    "cider": f"{_JAVA}. Its weights also depend on the other rows of the file. Use rouge_l and bleu",
    "meteor": f"{_JAVA}. Use rouge_l and bleu",
    "spice": f"{_JAVA}. Use rouge_l and bleu",
    "bertscore": f"It needs another model. Use rouge_l, or your own function: {OWN}",
    "clipscore": f"It needs another model. Use rouge_l, or your own function: {OWN}",
}

#: Other names of metrics -> the name here.
ALIASES = {
    "acc": "accuracy",
    "edit_distance": "cer",
    "em": "exact_match",
    "exact": "exact_match",
    "grounding": "iou",
    "json": "json_fields",
    "miou": "iou",
    "rouge": "rouge_l",
    "rougel": "rouge_l",
    "sacrebleu": "bleu",
    "vqa": "vqa_accuracy",
    "vqa_score": "vqa_accuracy",
}


def metric_of(word: str) -> Metric:
    """Return the metric of a name or of `FILE.py:FUNCTION`.

    Raises:
        ConfigError: there is none, or a package that it needs is not installed.
    """
    if ":" in word or word.endswith(".py"):
        from vlft.metrics.own import own_metric

        return own_metric(word)
    if word not in MODULES:
        raise ConfigError(_unknown(word))
    package = PACKAGES.get(word)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(f"metric {word}: the package {package} is not installed. Install it: {INSTALL}")
    module = importlib.import_module(f"vlft.metrics.{MODULES[word]}")
    return next(metric for metric in module.METRICS if metric.name == word)


def _unknown(word: str) -> str:
    plain = word.lower().replace("-", "_")
    if plain in REFUSED:
        return f"metric {word} is not supported. {REFUSED[plain]}"
    close = difflib.get_close_matches(plain, NAMES, n=1, cutoff=0.6)
    near = ALIASES.get(plain) or (plain if plain in NAMES else next(iter(close), None))
    hint = f" Do you mean {near}?" if near else ""
    return f"there is no metric {word!r}.{hint} The metrics: {', '.join(NAMES)}; or your own function: {OWN}"

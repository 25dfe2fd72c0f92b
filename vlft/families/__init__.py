"""The model families that vlft trains: names, features and sizes. Needs no torch.

Each family is one file with one constant. All other code uses `Family.of(config.model_type)` and never the name of a
model. A new family needs its file, an import here and an entry in the tuple below.
"""

from vlft.families.configs import is_tied, untied
from vlft.families.family import (
    FAMILIES,
    REFUSED,
    TOWERS,
    Family,
    Feature,
    Norm,
    Shape,
    VideoRule,
    VideoTime,
    sizes_of,
)
from vlft.families.qwen2_5_vl import QWEN2_5_VL
from vlft.families.qwen2_vl import QWEN2_VL
from vlft.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from vlft.families.qwen3_vl import QWEN3_VL, QWEN3_VL_MOE
from vlft.families.refused import reasons
from vlft.families.sizes import Experts, Layer, Linear, Recurrent, Sizes, TextSizes, VisionSizes

#: The family without a base: for `vlft check-data` without --model_id, and for the demo.
DEFAULT = QWEN2_VL

_ALL = (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_5, QWEN3_VL_MOE, QWEN3_5_MOE)
FAMILIES.update({family.model_type: family for family in _ALL})

REFUSED.update(reasons(_ALL))

__all__ = [
    "DEFAULT",
    "FAMILIES",
    "REFUSED",
    "TOWERS",
    "Experts",
    "Family",
    "Feature",
    "Layer",
    "Linear",
    "Norm",
    "Recurrent",
    "Shape",
    "Sizes",
    "TextSizes",
    "VideoRule",
    "VideoTime",
    "VisionSizes",
    "is_tied",
    "sizes_of",
    "untied",
]

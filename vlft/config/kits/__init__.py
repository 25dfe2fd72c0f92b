"""Flags of other fine-tuning kits, and what each value of them is here. Facts from the kits' own argument classes.

One file a kit: `two_u1` (2U1/Qwen2-VL-Finetune), `llama_factory`, `swift` (ms-swift), `axolotl`, `trl`; `common` has
what all of them share, and `meant` names that people try. `vlft.config.translate` reads them.
"""

from vlft.config.kits import axolotl, common, llama_factory, meant, swift, trl, two_u1
from vlft.config.kits.outcome import Kit

#: In the order in which a draw is decided.
KITS: tuple[Kit, ...] = (two_u1.KIT, llama_factory.KIT, swift.KIT, axolotl.KIT, trl.KIT)
#: Rules that hold beside any kit.
ANYWHERE: tuple[Kit, ...] = (common.KIT, meant.KIT)

"""Flags of other fine-tuning kits, and their translation. The facts come from the kits' own argument classes.

One file per kit: `two_u1` (2U1/Qwen2-VL-Finetune), `llama_factory`, `swift` (ms-swift), `axolotl`, `trl`. `common` has
the flags that all of them share, `adapters` the settings of peft that vlft does not train, and `meant` has short forms
and synonyms. `vlft.config.translate` reads them.
"""

from vlft.config.kits import axolotl, common, llama_factory, meant, swift, trl, two_u1
from vlft.config.kits.outcome import Kit

#: If two kits match a command line equally well, the first one wins.
KITS: tuple[Kit, ...] = (two_u1.KIT, llama_factory.KIT, swift.KIT, axolotl.KIT, trl.KIT)
#: Rules that apply in addition to any kit.
ANYWHERE: tuple[Kit, ...] = (common.KIT, meant.KIT)

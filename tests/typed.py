"""What mypy must see of the public functions, from outside (`vlft/py.typed`). It is read by mypy, and never run."""

# mypy: warn-unused-ignores
from collections.abc import Iterator
from typing import Any, assert_type

import torch

from vlft import Base, Loader, Rows, data_loader, load_model, load_rows, open_base, parameter_groups, preview_row
from vlft import save_model as save
from vlft.data.sample import Sample
from vlft.errors import BadRow

base = open_base("Qwen/Qwen2-VL-2B-Instruct", image_max_pixels=1280 * 28 * 28, fps=2.0, packing=False)
assert_type(base, Base)
rows = load_rows(base, ["a.json", "b.json"], image_folder="images", on_bad_row="skip")
assert_type(rows, Rows)
assert_type(rows[0], Sample)
assert_type(rows[:2], Rows)
assert_type(rows.skipped, tuple[BadRow, ...])
loader = data_loader(base, rows, global_batch=16)
assert_type(loader, Loader)
assert_type(iter(loader), Iterator[dict[str, Any]])
model = load_model(base, vision="lora", merger="full")
module: torch.nn.Module = model
assert_type(parameter_groups(base, model, learning_rate=1e-4), list[dict[str, Any]])
assert_type(preview_row(base, rows, 0), str)
save(base, model, "output/mine")

load_model(base, vision="lorra")  # type: ignore[arg-type]
open_base(3)  # type: ignore[arg-type]

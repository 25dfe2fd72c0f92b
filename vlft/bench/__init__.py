"""How fast rows are prepared and trained, beside stock transformers on the same rows in the same call.

`data` measures the loader, `train` whole training runs, each in a process of its own. `mixes` and `shapes` make rows
and bases where the user names none; `stock`, `baseline` and `tune` are the other side.
"""

"""Benchmarks of data loading and training, compared with stock transformers on the same rows in the same call.

`data` measures the loader, and `train` complete training runs, each in its own process. `mixes` and `sizes` make rows
and bases if the user names none. `stock`, `baseline` and `tune` are the stock side.
"""

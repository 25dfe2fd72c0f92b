"""What the fork server of `launch` imports before it forks."""

import importlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - and by it, torch's compiler: seconds in each process
import peft  # noqa: F401
import torch

import vlft.train.run  # noqa: F401

torch.set_num_threads(1)
# DeepSpeed 0.19 on a CPU compiles a collective over shared memory when it first runs, for most of a minute, where a GPU
# has NCCL. Without it the processes reduce by gloo, as under DDP.
# (As an attribute, `deepspeed.comm.torch` is torch itself.)
vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None

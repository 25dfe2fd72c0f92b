"""What the fork server of `launch` imports before it forks."""

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

"""The documents, and both packages on the path: the quantize side's environment has one of them."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)  # four times as fast on models this small, where cores are shared

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "serve"), str(ROOT / "benchmarks")]

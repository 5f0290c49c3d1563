"""Tests import the project's files from the folder above, and share two cores fairly."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(2)

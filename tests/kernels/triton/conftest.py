"""Triton's interpreter, unless there is a GPU to run on. It has to be chosen before triton is first imported."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: set it in the environment")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _one_thread_and_seed(one_thread_and_seed: None) -> None:
    """For every test of this folder."""

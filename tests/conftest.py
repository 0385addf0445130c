"""What every test starts from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

pytest.register_assert_rewrite("tests.support")  # their failures show values too

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other; before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; has no effect once triton is imported


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton's kernels run: a GPU, or the CPU, in Triton's interpreter."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def one_thread_and_seed() -> None:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)

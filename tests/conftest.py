"""What every test starts from."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other; before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; has no effect once triton is imported

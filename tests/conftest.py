"""What every test starts from."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other; before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

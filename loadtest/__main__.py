"""`python -m loadtest`."""

import os
import signal
import sys

from loadtest.cli import main

try:
    try:
        exit_code = main()
    finally:  # also where argparse ends it
        sys.stdout.flush()
except BrokenPipeError:  # whoever read the output has left, as `head` does: nobody would read a traceback either
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    exit_code = 128 + signal.SIGPIPE
sys.exit(exit_code)

"""`python -m loadtest.gpu`."""

import sys

from loadtest.gpu.cli import main

if __name__ == "__main__":  # the processes of a section import this file too
    sys.exit(main())

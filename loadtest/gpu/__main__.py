"""`python -m loadtest.gpu`."""

import sys

from loadtest.gpu.cli import main

sys.exit(main())

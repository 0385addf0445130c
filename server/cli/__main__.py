"""`python -m server.cli` is `peregrine`."""

import sys

from server.cli.start import main

sys.exit(main())

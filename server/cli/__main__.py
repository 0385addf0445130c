"""`python -m server.cli` is `peregrine`."""

import sys

from server.cli.main import main

sys.exit(main())

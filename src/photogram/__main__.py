"""`python -m photogram`: the same as the command `photogram`."""

import sys

from .cli import main

sys.exit(main())

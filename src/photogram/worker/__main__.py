"""`python -m photogram.worker SOCKET`: started by the host."""

import sys

from .main import main

sys.exit(main(sys.argv[1:]))

"""`python -m photogram.worker SOCKET`: started by the host."""

import sys

from .parent import end_with_parent


def run() -> int:
    # Before torch is imported, which takes seconds in which a host may die.
    end_with_parent()
    from .main import main

    return main(sys.argv[1:])


sys.exit(run())

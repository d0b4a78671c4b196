"""Entry of the zipapp and of `python -m toolkit.runner`."""

import sys

from .cli import main

sys.exit(main(sys.argv[1:]))

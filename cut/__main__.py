"""``python -m cut``: the ``cut`` command where another program has that name first on the path."""

import sys

from cut.cli import main

sys.exit(main())

"""``python -m fxmerge`` is ``fxmerge``."""

import sys

from fxmerge.cli import main

sys.exit(main())

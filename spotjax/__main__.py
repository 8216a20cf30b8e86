"""``python -m spotjax`` is ``spotjax``."""

import sys

from spotjax.cli import main

sys.exit(main())

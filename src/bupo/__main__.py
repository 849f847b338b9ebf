"""``python -m bupo`` is the command ``bupo``."""

import sys

from bupo.cli import main

sys.exit(main())

"""``python -m bupo`` is the command ``bupo``."""

from __future__ import annotations

import sys

from bupo.cli import main

sys.exit(main())

"""``bupo``: the command line. Arguments are parsed first; torch is imported only by the command that runs."""

from __future__ import annotations

from bupo.cli.app import main

__all__ = ["main"]

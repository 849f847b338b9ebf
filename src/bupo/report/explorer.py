"""The token explorer: a heat map of layers by tokens for chosen responses, drawn in the page by ``explorer.js``.

Tokens are text that a model wrote. They reach the page only inside a JSON data block in which no character can end
the block, and the script shows them as text (``textContent``, canvas), never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from markupsafe import Markup

from bupo.report.results import ExploredTokens

# Characters that could end a script element early; json itself escapes everything beyond ASCII.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def data_block(tokens: Sequence[tuple[str, ExploredTokens]]) -> Markup:
    """The samples of each named model as JSON that is safe inside ``<script type="application/json">``."""
    models = [
        {"name": name, "samples": [sample.model_dump(exclude_none=True) for sample in item.samples]}
        for name, item in tokens
    ]
    return Markup(json.dumps({"models": models}, separators=(",", ":"), allow_nan=False).translate(_ESCAPES))


@cache
def script() -> Markup:
    """The page's only script."""
    return Markup(template_text("explorer.js"))


def script_policy() -> str:
    """The source of `script` in the content security policy, which lets no other script of the page run."""
    digest = hashlib.sha256(str(script()).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def template_text(name: str) -> str:
    """The text of a file in the templates folder."""
    return files("bupo.report").joinpath("templates", name).read_text(encoding="utf-8")

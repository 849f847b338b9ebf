"""The token explorer: a heat map of layers by tokens for chosen samples, drawn in the page by ``explorer.js``.

Tokens are text that a model wrote. They reach the page only inside a JSON data block in which no character can end
the block, and the script puts them on the page as text (``textContent``, canvas), never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from bupo.errors import InputError

if TYPE_CHECKING:
    from markupsafe import Markup

MEASURES = ("entropy", "logprob", "kl", "rank")  # each (L, T); only the first is required
# What could end a script element or a JSON string early. Everything beyond ASCII is escaped by json itself.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def check_tokens(content: Any, where: str) -> None:
    """Raise `InputError` unless ``content`` is a ``tokens.json`` of schema 1 whose lists have the sizes they should.

    ``{"schema": 1, "samples": [{"problem_id", "prompt": str, "tokens": T strings, "layers": L, "entropy": L x T,
    "logprob", "kl", "rank": the same or absent, "top": L x T lists of [token, probability], or absent}]}``
    """
    if not isinstance(content, Mapping) or content.get("schema") != 1 or not content.get("samples"):
        raise InputError(f"{where} holds no token statistics of schema 1; write it with `bupo analyze --explore N`")
    if not isinstance(content["samples"], list):
        raise InputError(f"{where}: 'samples' is no list")
    for number, sample in enumerate(content["samples"], 1):
        at = f"{where}: sample {number}"
        if not isinstance(sample, Mapping) or not isinstance(sample.get("tokens"), list) or not sample["tokens"]:
            raise InputError(f"{at} has no tokens; write it again with `bupo analyze --explore N`")
        layers, width = sample.get("layers"), len(sample["tokens"])
        if not isinstance(layers, int) or layers < 1:
            raise InputError(f"{at} has no number of layers; write it again with `bupo analyze --explore N`")
        for name in (*MEASURES, "top"):
            rows = sample.get(name)
            if rows is None and name != "entropy":
                continue
            if not _is_table(rows, layers, width):
                raise InputError(f"{at}: {name} is no table of {layers} layers x {width} tokens")


def _is_table(rows: Any, height: int, width: int) -> bool:
    return isinstance(rows, list) and len(rows) == height and all(isinstance(r, list) and len(r) == width for r in rows)


def data_block(tokens: Sequence[Mapping[str, Any]]) -> Markup:
    """The samples as JSON that is safe inside ``<script type="application/json">``.

    Args:
        tokens: contents of ``tokens.json``, each with a ``name``.
    """
    from markupsafe import Markup

    kept = ("problem_id", "prompt", "tokens", "layers", *MEASURES, "top")
    models = [
        {
            "name": str(item.get("name") or item.get("model") or "model"),
            "samples": [
                {key: sample[key] for key in kept if sample.get(key) is not None} for sample in item["samples"]
            ],
        }
        for item in tokens
    ]
    return Markup(json.dumps({"models": models}, separators=(",", ":"), allow_nan=False).translate(_ESCAPES))


@cache
def script() -> Markup:
    """The page's only script."""
    from markupsafe import Markup

    return Markup(files("bupo.report").joinpath("templates", "explorer.js").read_text(encoding="utf-8"))


def script_policy() -> str:
    """The content security policy's name for `script`: no other script of the page can run."""
    digest = hashlib.sha256(str(script()).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"

"""Checks what reward functions return before anything is trained on it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import nn

from bupo.errors import InputError, shown


def finite(title: str, values: Any, completions: Sequence[Any]) -> list[float | None]:
    """The values, one finite number or None per response; `InputError` names the function, the response and the value.

    NaN would be taken for None, and an infinite reward would set the advantages of its group to 0.
    """
    if not hasattr(values, "__len__") or isinstance(values, (str, dict)) or len(values) != len(completions):
        raise InputError(f"{title} must return one number per response ({len(completions)}), not {shown(values)}")
    return [_finite(title, value, i, completions[i]) for i, value in enumerate(values)]


def _finite(title: str, value: Any, i: int, completion: Any) -> float | None:
    with suppress(TypeError, ValueError, OverflowError):  # a TypeError for text and lists
        if value is None or math.isfinite(value):
            return None if value is None else float(value)
    raise InputError(
        f"{title} must return a finite number or None per response, but returned {shown(value)} for response {i + 1} "
        f"of its batch: {str(completion)[:60]!r}"
    )


@contextmanager
def checked(trainer: Any, completions: Sequence[Any]) -> Iterator[None]:
    """Within this context, the trainer's reward functions and reward models pass `finite`."""
    functions = trainer.reward_funcs
    with ExitStack() as stack:
        trainer.reward_funcs = [
            _checked(stack, f"reward {name}", function, completions)
            for name, function in zip(trainer.reward_func_names, functions, strict=True)
        ]
        stack.callback(setattr, trainer, "reward_funcs", functions)
        yield


def _checked(stack: ExitStack, title: str, function: Any, completions: Sequence[Any]) -> Callable[..., Any]:
    def check(model: Any, inputs: Any, output: Any) -> None:
        finite(title, output.logits[:, 0].tolist(), completions)

    async def later(**columns: Any) -> list[float | None]:
        return finite(title, await function(**columns), completions)

    if isinstance(function, nn.Module):
        stack.enter_context(function.register_forward_hook(check))
        return function
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return later
    return lambda **columns: finite(title, function(**columns), completions)

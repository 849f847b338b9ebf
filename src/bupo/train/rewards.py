"""The rewards of a recipe, and a check of what any reward function returns before something is trained on it."""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import nn

from bupo.data.problems import Problem
from bupo.errors import BupoError, ConfigError, InputError, out_of_memory, shown
from bupo.grading import Grader, boxed_string


class Reward:
    """A reward function of a recipe, called as TRL calls it; ``problem`` holds numbers of problems.

    The function gets ``prompts``, ``completions`` (texts), ``completion_ids``, ``problem`` and ``problems`` (the
    `Problem` of each response) by name. If it fails, `InputError` names it.
    """

    def __init__(self, name: str, function: Callable[..., Any], problems: Sequence[Problem]):
        self.__name__, self._function, self._problems = name, function, problems
        self.close = getattr(function, "close", lambda: None)

    def __call__(self, problem: Sequence[int], **columns: Any) -> Any:
        with self._named():
            return self._function(problem=problem, problems=[self._problems[i] for i in problem], **columns)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            if isinstance(error, BupoError) or (isinstance(error, Exception) and out_of_memory(error) is not None):
                raise
            raise InputError(f"reward {self.__name__} failed with {shown(error, 300)}") from error


class AsyncReward(Reward):
    """A reward whose function is async, so that the trainer awaits all such rewards together."""

    async def __call__(self, problem: Sequence[int], **columns: Any) -> Any:
        with self._named():
            return await super().__call__(problem, **columns)


def make_rewards(names: Iterable[str], problems: Sequence[Problem]) -> list[Reward]:
    """A recipe's rewards by name: ``answer``, ``boxed-string``, or ``module:function`` (see `imported`)."""
    own = {"answer": Grader, "boxed-string": lambda: boxed_string}
    found = {name: own[name]() if name in own else imported(name) for name in names}
    return [(AsyncReward if _is_async(f) else Reward)(name, f, problems) for name, f in found.items()]


def imported(name: str) -> Callable[..., Any]:
    """The function ``module:function``, whose module may lie in the working directory; `ConfigError` if it is none."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python` does this, the command `bupo` does not
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ConfigError(f"reward {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"reward {name!r} must be a function, not {shown(found)}")
    return found


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


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
    if _is_async(function):
        return later
    return lambda **columns: finite(title, function(**columns), completions)

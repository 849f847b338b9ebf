"""Turns problems into the text, then the token ids, that a model continues, for analysis, training and evaluation.

The paper's templates are those of arXiv 2512.19673, training set-up.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from bupo.data.generators import TAGGED_INSTRUCTION
from bupo.data.problems import BOXED_INSTRUCTION, Problem, Prompt
from bupo.errors import InputError

_QWEN = (
    f"<|im_start|>system\n{BOXED_INSTRUCTION}<|im_end|>\n<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\n"
)
_PAPER = {
    "qwen-math": _QWEN,
    "qwen3-no-thinking": f"{_QWEN}<think>\n\n</think>\n\n",
    "octothinker": f"User: QUESTION\n{BOXED_INSTRUCTION}\n\nAssistant:",
}
TEMPLATES = ("auto", "raw", "chat", *_PAPER)


def _resolve(tokenizer: Any, template: str) -> str:
    if template not in TEMPLATES:
        raise InputError(f"unknown template {template!r}; use one of {', '.join(TEMPLATES)}")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise InputError("the tokenizer has no chat template; use --template raw or one of the paper's templates")
    return ("chat" if has_chat else "raw") if template == "auto" else template


def render_prompt(prompt: Prompt, tokenizer: Any, template: str = "auto") -> str:
    """Return the text that a model continues; raises `InputError` if the template cannot give it.

    ``chat`` is the tokenizer's own chat template with the generation prompt (a plain text becomes one user message).
    Where it fails on a system message or leaves it out, the system text goes in front of the first user message.
    ``raw`` is the text unchanged (messages are joined by blank lines). ``auto`` is ``chat`` if the tokenizer has a chat
    template, else ``raw``. The paper's templates have their own instruction, which replaces a standard system message.
    """
    template = _resolve(tokenizer, template)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if template == "raw":
        return "\n\n".join(message["content"] for message in messages)
    if template == "chat":
        return _chat_text(messages, tokenizer)
    standard = [{"role": "system", "content": text} for text in (BOXED_INSTRUCTION, TAGGED_INSTRUCTION)]
    turns = [turn for turn in messages if turn not in standard]
    if [turn["role"] for turn in turns] != ["user"]:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"template {template} takes one user message, not ({roles}); use --template chat")
    return _PAPER[template].replace("QUESTION", turns[0]["content"])


def _chat_text(messages: list[dict[str, str]], tokenizer: Any) -> str:
    attempts, system, reason = [messages], "", None
    if [turn["role"] for turn in messages[:2]] == ["system", "user"]:
        first, second, *rest = messages
        system = first["content"].strip()
        attempts.append([{**second, "content": f"{first['content']}\n\n{second['content']}"}, *rest])
    for turns in attempts:
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and raises whatever it likes
            reason = reason or error
            continue
        if turns is not attempts[-1] and system not in text:
            continue
        if turns is not messages:
            warnings.warn("the chat template takes no system message; it is put before the user message", stacklevel=1)
        return text
    failed = f"the tokenizer's chat template fails: {type(reason).__name__}: {reason}"
    raise InputError(f"{failed}; correct the template, or use --template raw") from reason


def prompts_of(
    problems: Sequence[Problem], tokenizer: Any, template: str, vocabulary: int | None = None
) -> list[list[int]]:
    """The token ids of every problem's prompt; `InputError` names the problem, also for ids from ``vocabulary`` on."""
    template, prompts = _resolve(tokenizer, template), []
    for problem in problems:
        try:
            prompts.append(prompt_ids(problem.prompt, tokenizer, template))
            if vocabulary is not None and (largest := max(prompts[-1])) >= vocabulary:
                outside = f"token id {largest} is outside the model's vocabulary of {vocabulary}"
                raise InputError(f"{outside}; use the tokenizer that belongs to the model")
        except InputError as error:
            raise InputError(f"problem {problem.id}: {error}") from error
    return prompts


def prompt_ids(prompt: Prompt, tokenizer: Any, template: str = "auto") -> list[int]:
    """Tokenize the text of `render_prompt`; raises its errors, and `InputError` for a prompt without tokens.

    A chat template writes its own special tokens, so none are added to its text; any other text gets those that the
    tokenizer adds, such as Llama's beginning-of-text token.
    """
    text = render_prompt(prompt, tokenizer, template)
    add_special_tokens = _resolve(tokenizer, template) != "chat"
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    if not ids:
        raise InputError("a prompt has no tokens; remove it or choose another template")
    return ids


def training_rows(
    problems: Sequence[Problem], tokenizer: Any, template: str, max_length: int, vocabulary: int | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Return the rows ``{"prompt", "problem"}`` (text and problem index) of the training set, and the number left out
    because they have more than ``max_length`` tokens.

    The trainer adds the tokenizer's special tokens to every text. If the chat template has already written the
    beginning-of-text token it is removed from the text, so that it does not appear twice.
    """
    rows, lengths = [], []
    prompts = prompts_of(problems, tokenizer, template, vocabulary)
    for index, (problem, ids) in enumerate(zip(problems, prompts, strict=True)):
        text = render_prompt(problem.prompt, tokenizer, template)
        texts = (text, text.removeprefix(tokenizer.bos_token or ""))
        same = [one for one in texts if list(tokenizer(text=[one])["input_ids"][0]) == ids]
        if not same:
            wrong = f"problem {problem.id}: the tokenizer adds special tokens"
            raise InputError(f"{wrong} that template {template!r} does not contain; use another template")
        lengths.append(len(ids))
        if len(ids) <= max_length:
            rows.append({"prompt": same[0], "problem": index})
    if not rows:
        raise InputError(f"no prompt fits into max_prompt_length {max_length}: the shortest has {min(lengths)} tokens")
    return rows, len(problems) - len(rows)

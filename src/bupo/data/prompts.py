"""Turns problems into prompts: the text, then the token ids, that a model continues.

This is the only place that does so, which is why analysis, training and every evaluation engine see the same token
ids. The paper's templates are those of arXiv 2512.19673, training set-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bupo.data.generators import TAGGED_INSTRUCTION
from bupo.data.problems import BOXED_INSTRUCTION, Problem, Prompt
from bupo.errors import InputError

TEMPLATES = ("auto", "raw", "chat", "qwen-math", "qwen3-no-thinking", "octothinker")


def _resolve(tokenizer: Any, template: str) -> str:
    if template not in TEMPLATES:
        raise InputError(f"unknown template {template!r}; use one of {', '.join(TEMPLATES)}")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise InputError("the tokenizer has no chat template; use --template raw or one of the paper's templates")
    return ("chat" if has_chat else "raw") if template == "auto" else template


def render_prompt(prompt: Prompt, tokenizer: Any, template: str = "auto") -> str:
    """Return the text that a model continues.

    ``chat`` is the tokenizer's own chat template with the generation prompt (a plain text becomes one user message).
    ``raw`` is the text unchanged (messages are joined by blank lines). ``auto`` is ``chat`` if the tokenizer has a chat
    template, else ``raw``. The other templates are the paper's; they contain their own instruction, which replaces a
    problem's standard system message.

    Raises:
        InputError: unknown template, no chat template, or messages that the template cannot express.
    """
    template = _resolve(tokenizer, template)
    if template == "raw":
        return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
    if template == "chat":
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    question = prompt if isinstance(prompt, str) else _only_question(prompt, template)
    if template == "octothinker":
        return f"User: {question}\n{BOXED_INSTRUCTION}\n\nAssistant:"
    text = (
        f"<|im_start|>system\n{BOXED_INSTRUCTION}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    return text + ("<think>\n\n</think>\n\n" if template == "qwen3-no-thinking" else "")


def _only_question(messages: Sequence[dict[str, str]], template: str) -> str:
    standard = (BOXED_INSTRUCTION, TAGGED_INSTRUCTION)
    turns = [turn for turn in messages if not (turn["role"] == "system" and turn["content"] in standard)]
    if len(turns) != 1 or turns[0]["role"] != "user":
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"template {template} takes one user message, not ({roles}); use --template chat")
    return turns[0]["content"]


def prompt_ids(prompt: Prompt, tokenizer: Any, template: str = "auto") -> list[int]:
    """Tokenize the text of `render_prompt`.

    A chat template writes its own special tokens, so none are added to its text; any other text gets those that the
    tokenizer adds, such as Llama's beginning-of-text token.

    Raises:
        InputError: see `render_prompt`; or the prompt has no tokens.
    """
    text = render_prompt(prompt, tokenizer, template)
    add_special_tokens = _resolve(tokenizer, template) != "chat"
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    if not ids:
        raise InputError("a prompt has no tokens; remove it or choose another template")
    return ids


def training_text(problem: Problem, tokenizer: Any, template: str) -> tuple[str, int]:
    """Return the prompt as the text that the trainer tokenizes, and its number of tokens.

    The trainer adds the tokenizer's special tokens to every text. If the chat template has already written the
    beginning-of-text token it is removed from the text, so that it does not appear twice.

    Raises:
        InputError: no text gives the token ids that evaluation uses.
    """
    ids = prompt_ids(problem.prompt, tokenizer, template)
    text = render_prompt(problem.prompt, tokenizer, template)
    for candidate in (text, text.removeprefix(tokenizer.bos_token or "")):
        if list(tokenizer(text=[candidate])["input_ids"][0]) == ids:
            return candidate, len(ids)
    raise InputError(
        f"problem {problem.id}: the tokenizer adds special tokens that template {template!r} does not contain; "
        "use another template"
    )


def training_rows(
    problems: Sequence[Problem], tokenizer: Any, template: str, max_length: int
) -> tuple[list[dict[str, Any]], int]:
    """Build the rows ``{"prompt", "problem"}`` (text and problem index) of the training set.

    Returns:
        The rows of prompts of at most ``max_length`` tokens, and the number of longer prompts, which are left out.

    Raises:
        InputError: every prompt is longer.
    """
    texts = [training_text(problem, tokenizer, template) for problem in problems]
    rows = [{"prompt": text, "problem": index} for index, (text, length) in enumerate(texts) if length <= max_length]
    if not rows:
        raise InputError(
            f"no prompt fits into max_prompt_length {max_length}: the shortest of {len(problems)} has "
            f"{min(length for _, length in texts)} tokens"
        )
    return rows, len(problems) - len(rows)

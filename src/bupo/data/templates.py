"""Prompt templates: the text, and then the token ids, with which a model is asked.

The one place that turns a problem into token ids, so that analysis, training and every evaluation engine see the
same ones. Paper templates: arXiv 2512.19673, training set-up.
"""

from __future__ import annotations

from typing import Any

from bupo.data.problems import BOXED_INSTRUCTION, TAGGED_INSTRUCTION, Prompt
from bupo.errors import InputError

TEMPLATES = ("auto", "raw", "chat", "qwen-math", "qwen3-no-thinking", "octothinker")


def render_prompt(prompt: Prompt, tokenizer: Any, template: str = "auto") -> str:
    """The text a model continues.

    ``chat`` is the tokenizer's own chat template with the generation prompt (a text becomes one user message),
    ``raw`` the text as it is (messages joined by blank lines), ``auto`` is ``chat`` where the tokenizer has a chat
    template and ``raw`` elsewhere. The others are the paper's: they bring their own instruction, so that a problem's
    standard system message is replaced.

    Raises:
        InputError: unknown template, no chat template, or messages the template cannot express.
    """
    if template not in TEMPLATES:
        raise InputError(f"unknown template {template!r}; one of {', '.join(TEMPLATES)}")
    if template == "auto":
        template = "chat" if getattr(tokenizer, "chat_template", None) else "raw"
    if template == "raw":
        return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template; use --template raw or one of the paper's templates")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    question = _question(prompt, template)
    if template == "octothinker":
        return f"User: {question}\n{BOXED_INSTRUCTION}\n\nAssistant:"
    text = (
        f"<|im_start|>system\n{BOXED_INSTRUCTION}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    return text + ("<think>\n\n</think>\n\n" if template == "qwen3-no-thinking" else "")


def prompt_ids(prompt: Prompt, tokenizer: Any, template: str = "auto") -> list[int]:
    """Token ids of `render_prompt`'s text.

    A chat template writes its own special tokens, so none are added to it; other text gets the tokenizer's
    (a Llama's beginning-of-text token).

    Raises:
        InputError: as `render_prompt`, or the prompt has no tokens.
    """
    text = render_prompt(prompt, tokenizer, template)
    templated = template == "chat" or (template == "auto" and bool(getattr(tokenizer, "chat_template", None)))
    ids = list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
    if not ids:
        raise InputError("a prompt has no tokens; remove it or choose another template")
    return ids


def _question(prompt: Prompt, template: str) -> str:
    if isinstance(prompt, str):
        return prompt
    own = (BOXED_INSTRUCTION, TAGGED_INSTRUCTION)
    turns = [message for message in prompt if not (message["role"] == "system" and message["content"] in own)]
    if len(turns) != 1 or turns[0]["role"] != "user":
        roles = ", ".join(m["role"] for m in prompt)
        raise InputError(f"template {template} takes one user message, not ({roles}); use --template chat")
    return turns[0]["content"]

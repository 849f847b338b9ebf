import json

import pytest

from bupo.data.problems import BOXED_INSTRUCTION, Problem
from bupo.data.prompts import prompt_ids, prompts_of, render_prompt
from bupo.data.rollouts import read_responses
from bupo.errors import InputError


class Tokenizer:
    """Bytes as tokens, 257 as the beginning of text; a chat template if asked for."""

    def __init__(self, chat: bool):
        self.chat_template = "x" if chat else None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [257] * (add_special_tokens and bool(text)) + list(text.encode())}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


MESSAGES = [{"role": "system", "content": BOXED_INSTRUCTION}, {"role": "user", "content": "1+1?"}]
QWEN = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
)
OCTO = "User: 1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:"


@pytest.mark.parametrize(
    ("prompt", "chat", "template", "text"),
    [
        ("hi", False, "auto", "hi"),
        ("hi", True, "auto", "<user>hi<assistant>"),
        ("hi", True, "raw", "hi"),
        (MESSAGES, False, "auto", BOXED_INSTRUCTION + "\n\n1+1?"),
        (MESSAGES, True, "auto", f"<system>{BOXED_INSTRUCTION}<user>1+1?<assistant>"),
        (MESSAGES, False, "qwen-math", QWEN),
        (MESSAGES, False, "qwen3-no-thinking", QWEN + "<think>\n\n</think>\n\n"),
        ("1+1?", False, "octothinker", OCTO),
    ],
)
def test_texts(prompt, chat, template, text):
    assert render_prompt(prompt, Tokenizer(chat), template) == text
    # special tokens are added unless the chat template writes them
    assert (257 in prompt_ids(prompt, Tokenizer(chat), template)) == (not chat or template == "raw")


def test_wrong_use_is_refused():
    with pytest.raises(InputError, match=r"unknown template 'qwen'.*octothinker"):
        render_prompt("hi", Tokenizer(True), "qwen")
    with pytest.raises(InputError, match="no chat template"):
        render_prompt("hi", Tokenizer(False), "chat")
    with pytest.raises(InputError, match=r"takes one user message, not .system, user."):
        render_prompt([{"role": "system", "content": "be rude"}, MESSAGES[1]], Tokenizer(True), "qwen-math")
    with pytest.raises(InputError, match="no tokens"):
        prompt_ids("", Tokenizer(False))


class Template(Tokenizer):
    """Renders with a function of the messages."""

    def __init__(self, render):
        super().__init__(True)
        self.apply_chat_template = lambda messages, **options: render(messages)


def _no_system(messages):
    if messages[0]["role"] == "system":
        raise ValueError("System role not supported")
    return "|".join(m["content"] for m in messages)


@pytest.mark.parametrize("render", [_no_system, lambda ms: "|".join(m["content"] for m in ms if m["role"] != "system")])
def test_a_template_without_a_system_role_puts_its_text_before_the_user_s(render):
    with pytest.warns(UserWarning, match="takes no system message"):
        text = render_prompt([*MESSAGES, {"role": "assistant", "content": "2"}], Template(render))
    assert text == f"{BOXED_INSTRUCTION}\n\n1+1?|2"
    assert render_prompt("hi", Template(render)) == "hi"


def test_a_failing_template_and_ids_beyond_the_model_name_the_problem():
    problems = [Problem("p/0", "ab", "1", "p"), Problem("p/1", "az", "1", "p")]
    with pytest.raises(InputError, match=r"problem p/0: the tokenizer's chat template fails: KeyError: 'x'"):
        prompts_of(problems, Template(lambda messages: messages[0]["x"]), "auto")
    assert prompts_of(problems, Tokenizer(True), "raw", 258) == [[257, 97, 98], [257, 97, 122]]
    with pytest.raises(InputError, match=r"problem p/1: token id 122 is outside the model's vocabulary of 122"):
        prompts_of(problems, Template(lambda messages: messages[0]["content"]), "auto", 122)


def test_responses_with_ids_and_with_text(tmp_path):
    path = tmp_path / "r.jsonl"
    rows = [
        {"problem_id": 7, "prompt_ids": [1, 2], "response_ids": [3], "other": "x"},
        {"prompt": "a", "response": [{"role": "assistant", "content": "b"}]},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    first, second = read_responses(path, Tokenizer(False))
    assert (first.prompt_ids, first.response_ids, first.problem_id) == ([1, 2], [3], "7")
    assert (second.prompt_ids, second.response_ids) == ([257, ord("a")], [ord("b")])


def test_shared_responses(shared_data):
    assert len(read_responses(shared_data / "smollm2_math500_responses.jsonl")) > 10


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [1]}, "needs prompt_ids and response_ids, or prompt and response; columns found: prompt_ids"),
        ({"prompt_ids": [1], "response_ids": []}, "row 0: the response is empty"),
        ({"prompt_ids": [1], "response_ids": ["a"]}, "must be a list of token ids"),
        ({"prompt": "a", "response": "b"}, "there is no tokenizer"),
        ({"prompt": "a", "response": 5}, "row 0: response must be text, not 5"),
        ({"prompt": [1], "response": "b"}, r"row 0: prompt must be text or a list of messages with content, not \[1\]"),
        ({"prompt": "a", "response": "b\ud83d"}, r"row 0: 'response' holds '\\ud83d', half of a character"),
    ],
)
def test_wrong_responses(tmp_path, row, message):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        read_responses(path)

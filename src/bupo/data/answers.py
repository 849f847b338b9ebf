"""Reads answers as text: finds them in responses, compares those that need no mathematics, writes one form of each."""

import re
from fractions import Fraction

MAX_MATH_CHARS = 1_000  # longer answers are not parsed; those of benchmarks are far shorter
_RATIONAL = re.compile(
    r"(-?)(?:\\[dt]?frac\{([0-9]{1,18})\}\{(?!0+\})([0-9]{1,18})\}"
    r"|([0-9]{0,9}\.[0-9]{1,9}|[0-9]{1,18}(?:/(?!0+$)[0-9]{1,18})?))"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|(\\[A-Za-z]+|[^\s$\\{]{1,200}))")
_WRAPPER = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|textrm|textnormal|operatorname)\s*\{([^{}]*)\}")
_CHARACTERS = str.maketrans({
    "∞": r"\infty ", "°": r"^{\circ}", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "−": "-", "–": "-", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "θ": r"\theta ",
    **{sign: f"^{digit}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
})  # fmt: skip
_TEXT = r"\\(?:text|mathrm|mbox|textrm|textnormal|textbf|mathbf|rm|operatorname)\s*"
_UNIT = (  # without a text command; single letters are factors, not units
    r"(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?:[cmk]m|[mk]g|lb|oz|ft|in|[mk]ph|m[lL]|hr|sec|min|feet|foot|inch(?:es)?|(?:unit"
    r"|yard|mile|(?:centi|kilo)?met(?:er|re)|dollar|cent|degree|second|minute|hour|day|week|month|year|point|way|student)s?)"
)
_UNIT_END = r"(?:\^\{?(?:[23]|-[123])\}?)?(?=\s*(?:$|,|and))"
_SENTENCE = re.compile(r"\b(?:not?|is|isn't|are|or|and|but|wrong|false|incorrect|than|if|except|never|plus|minus|to)\b")


def last_boxed(text: str) -> str | None:
    """Return the content of the last box, None if it is not closed; ``\\boxed 5`` counts where no box has braces."""
    boxes = list(_BOX.finditer(text))
    braced = [box for box in boxes if box[1]]
    if not braced:
        return boxes[-1][2] if boxes else None
    start, depth = braced[-1].end(), 1
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start : start + match.start()]
    return None


def extract_answer(response: str, *, tagged: bool = False) -> str | None:
    """Return the last box after the thinking, or else, if the prompt asked for tags, the last tag or line."""
    response = response.rpartition("</think>")[2]
    boxed = last_boxed(response)
    if boxed is not None or not tagged:
        return boxed
    if "<answer>" in response:
        return response.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    return response.rstrip().rpartition("\n")[2].strip() or None


def is_usable(gold: str) -> bool:
    """Whether answers can be compared with this gold answer: it is not empty, and its braces are closed."""
    braces = re.sub(r"\\[{}]", "", gold)
    return len(gold) <= MAX_MATH_CHARS and bool(re.search(r"\w", gold)) and braces.count("{") == braces.count("}")


def rational(text: str) -> Fraction | None:
    """Return the value of an integer, fraction or decimal; None for other text."""
    tight = re.sub(r"\s*([-/{}.])\s*", r"\1", text[:200].strip().strip("$").strip())
    if len(text) > 200 or not (match := _RATIONAL.fullmatch(tight)):
        return None
    sign, top, bottom, plain = match.groups()
    return Fraction(sign + (plain or f"{top}/{bottom}"))


def equal_at_sight(gold: str, answer: str) -> bool | None:
    """Compare the same texts, and numbers; None for others, and for unequal decimals, which math-verify rounds."""
    if gold.strip() == answer.strip():
        return True
    first, second = rational(gold), rational(answer)
    decides = None not in (first, second) and (first == second or "." not in gold + answer)
    return first == second if decides else None


def strip_answer(answer: str) -> str:
    """Remove what only surrounds an answer: spaces, dollar signs, a pair of braces, a final full stop."""
    text = answer.strip()
    while True:
        inner = text.strip("$").strip()
        inner = re.sub(r"(?<!\\)[.,;]$", "", inner).rstrip()
        if inner.startswith("{") and last_boxed(f"\\boxed{inner}") == inner[1:-1]:
            inner = inner[1:-1].strip()
        if inner == text:
            return text
        text = inner


def plain_text(answer: str) -> str:
    """Return an answer as words: text commands unwrapped, single spaces, lower case."""
    text = strip_answer(answer)
    while (unwrapped := _WRAPPER.sub(r"\1", text)) != text:
        text = unwrapped
    text = re.sub(r"(?:\\[ ,;:!]|~|\s)+", " ", text).strip().lower()
    return text[1:-1].strip() if re.fullmatch(r"\([a-z]\)", text) else text


def is_words(answer: str) -> bool:
    """Tell a word or phrase (``\\text{east}``, ``Yes``, ``none of these``) from a formula such as ``xy``."""
    text = plain_text(answer)
    if re.fullmatch(r"[A-Z]{2,}", strip_answer(answer)) or text in ("yes", "no"):
        return True
    if not re.fullmatch(r"[a-z]+(?:[ '-]+[a-z]+)*", text):
        return False
    letters = len(text.replace(" ", ""))
    return letters >= 4 or (letters >= 2 and bool(_WRAPPER.fullmatch(answer.strip())))


def _repeating(match: re.Match[str]) -> str:
    whole, start, period = match.groups()
    nines = 10 ** len(start) * (10 ** len(period) - 1)
    value = Fraction(int(whole + start + period) - int((whole + start) or 0), nines)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _without_unit(match: re.Match[str]) -> str:
    return match[0] if _SENTENCE.search(match[0]) or len(match[0].split()) > 4 else match[1]


_REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\*\*(.*)\*\*", r"\1"),  # bold in Markdown
    (r"\\(?:displaystyle|left|right)(?![a-zA-Z.])\s*", ""),
    (rf"(?i)^(?:{_TEXT}\{{)?\s*(?:final )?answer\s*[:=]?\s*\}}?\s*[:=]?", ""),
    (r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[a-z]))", r"\\sqrt{\1\2\3}"),
    (rf"{_TEXT}\{{([eid])\}}", r" \1"),
    (r"\\log_\s*(?:e|\{\s*e\s*\})", r"\\ln "),
    (rf"_\s*\{{?\s*{_TEXT}\{{([^{{}}]*)\}}\s*\}}?", r"_{\1}"),
    (r"(?<!\\int)(?<!\\sum)(?<!\\prod)_\s*(?:\{\s*\\([a-zA-Z]+)\s*\}|\\([a-zA-Z]+))(?!\w|\{)", r"_{\1\2}"),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?", _repeating),
    (r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?![\w.])", r"\1\\cdot 10^{\2}"),
    (r"(?<![\d./}])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
    (r"(?<=\d)(?:\\[,! ]|,\\!\s*|\{,\}|~|\s)(?=\d{3}(?!\d))", ""),
    (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset "),
    (rf"([^\s_^{{]\s*)(?:\\[,; ])*{_TEXT}\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}{_UNIT_END}", _without_unit),
    (rf"(\d\s*){_UNIT}{_UNIT_END}(?! *\()", _without_unit),
)]  # fmt: skip


def normal_form(answer: str) -> str:
    """Return an answer without what surrounds it, and with units, digit groups and signs written in one way."""
    text = strip_answer(answer).translate(_CHARACTERS)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = strip_answer(text)
    between = ", " if re.fullmatch(r"[1-9]00(?:,[1-9]00)+", text) else ""  # 100,200 is a list
    return (
        text.replace(",", between)
        if re.fullmatch(r"(?:\\\$)?-?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:\s*\\?%)?", text)
        else text
    )

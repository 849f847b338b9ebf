"""More than a thousand answers made to hang, exhaust, crash or fool a grader; all are wrong for the gold answer 4."""

import random

GOLD = "4"
# Contents of a box that need no programming to write down, by kind; separated by ¦.
BOXED = {
    "look-alikes": "Ч¦ᔦ¦\u200b5¦４\u0338 5¦٥¦५¦4\u0301\u0301 5¦\u202e4 5¦𝟝¦５¦4\ufe0f⃣¦⁴¦₄¦④¦Ⅳ",
    "code": r"__import__('os').system('sleep 9')¦eval('2+2')¦exec('while True: pass')¦print(4)¦lambda: 4¦"
    r"().__class__.__bases__¦open('/etc/passwd').read()¦[x for x in range(10**9)]¦import os; os.abort()¦"
    r"\input{/etc/passwd}¦\write18{ls}¦\def\x{\x\x}\x¦\catcode`\{=12¦\loop\repeat¦%d%s%n¦'; DROP TABLE answers; --¦"
    r"${jndi:ldap://x}¦{{7*7}}¦`ls`¦$(ls)¦\0¦" + "\x00\x01\x02¦\ud7ff",
    "markup": "<script>alert(4)</script>¦<b>4</b>5¦&#53;¦<!-- 4 -->¦<answer>4</answer>¦# 4\n- 5¦[4](5)¦```4```5",
}
# Whole responses.
SEVERAL = (
    r"\boxed{4} and \boxed{5}¦\boxed{4}\boxed{}¦\boxed{4 \text{ or } 5}¦\boxed{3, 4, 5}¦\boxed{1\text{ to }9}¦"
    r"\boxed{4}, no, \boxed{four}¦\boxed{\text{4 or 5}}¦\boxed{x \in \mathbb{R}}¦\boxed{4=5}¦\boxed{4 \neq 5}¦"
    r"\boxed{\{4\}\cup\{5\}}¦\boxed{(4)(4)}¦\boxed{4\pm1}"
)
EMPTY = "¦ ¦" + "\n" * 1000 + r"¦\boxed{}¦\boxed{ }¦\boxed¦boxed{4}¦\boxed{$$}¦\boxed{\text{}}¦\boxed{~}"
BRACKETS = (("(", ")"), ("\\sqrt{", "}"), ("\\frac{1}{", "}"), ("{", "}"), ("\\left(", "\\right)"), ("-(", ")"))
LATEX = r"\frac \sqrt { } ^ _ ( ) [ ] | \left \right \sum \int x y 4 5 = < > , . ! + - * / & \\ % $ \text".split()  # noqa: SIM905
UNICODE = (*range(0xA0, 0xD7FF), *range(0x1F300, 0x1F600))


def answers(seed: int = 0) -> dict[str, list[str]]:
    """Whole responses by kind."""
    chance = random.Random(seed)

    def box(text: str) -> str:
        return f"The answer is $\\boxed{{{text}}}$."

    def noise(alphabet: str | list[str], low: int, high: int, between: str = "") -> str:
        return between.join(chance.choice(alphabet) for _ in range(chance.randint(low, high)))

    def tower(height: int) -> str:
        return "^{".join([str(chance.randint(5, 99))] * height) + "}" * (height - 1)

    def matrix(n: int) -> str:
        rows = "\\\\".join("&".join(["x"] * n) for _ in range(n))
        return f"\\begin{{pmatrix}}{rows}\\end{{pmatrix}}^{{{n * n}}}"

    powers = ((9, 9, 9), (2, 99, 99), (10, 10, 100), (7, 7, 77))
    megabytes = ("5", "x+", "\\frac{", "{}", "\\{", " ", "a\n", "\\boxed{")
    boxed = {
        "towers of powers": [*map(tower, range(3, 43)), *(f"{a}^{{{b}^{{{c}}}}}" for a, b, c in powers)],
        "factorials": [f"{10**n + 1}!" for n in range(3, 23)] + ["(" * n + "9" + "!)" * n for n in range(2, 22)],
        "big numbers": ["9" * n for n in (50, 500, 900, 5_000, 100_000)]
        + [f"{chance.randint(2, 9)}\\cdot10^{{{10**n}}}" for n in range(2, 17)],
        "binomials and sums": [f"\\binom{{{10**n}}}{{{10**n // 2}}}" for n in range(3, 13)]
        + [f"\\sum_{{k=1}}^{{{10**n}}} \\frac{{1}}{{k^{{{n}}}}}" for n in range(3, 13)],
        "integrals and limits": [f"\\int_0^{{{n}}} \\sin(x^{{{n}}}) e^{{x^{{{n}}}}} dx" for n in range(2, 22)]
        + [f"\\lim_{{x \\to \\infty}} (1+\\frac{{{n}}}{{x}})^{{x^{{{n}}}}}" for n in range(2, 12)],
        "deep nesting": [a * n + "5" + b * n for a, b in BRACKETS for n in (10, 40, 90, 120, 3_000, 50_000)],
        "powers of sums": [f"(x+y+z+{n})^{{{10 * n}}}" for n in range(1, 61)],
        "matrices": [matrix(n) for n in range(2, 16)],
        "equations": [f"x^{{{n}}}+{n}x^{{3}}-x+1=0" for n in range(3, 33)],
        "megabytes": [text * (1_000_000 // len(text)) for text in megabytes],
        "lists": [", ".join(map(str, range(n))) for n in range(6, 46)],
        "random latex": [noise(LATEX, 3, 60, " ") + " 5 \\ne" for _ in range(300)],
        "random characters": [noise("0123456789+-*/^!(){}\\.,=xe ", 5, 300) + "\\ne" for _ in range(200)],
        "random unicode": [noise([*map(chr, UNICODE)], 2, 80) + "z" for _ in range(60)],
    }
    boxed |= {kind: texts.split("¦") for kind, texts in BOXED.items()}
    kinds = {kind: list(map(box, texts)) for kind, texts in boxed.items()}
    kinds["megabytes"] += ["\\boxed{" * 150_000, "\\boxed{5}" * 110_000, "}" * 1_000_000, "é" * 500_000]
    kinds["megabytes"] += ["{" * 1_000_000 + "\\boxed{5}"]
    kinds["several"], kinds["empty"] = SEVERAL.split("¦"), EMPTY.split("¦")
    kinds["unbalanced"] = [
        text
        for n in range(1, 31)
        for text in ("\\boxed{" + "{" * n + "4", "\\boxed{4" + "\\}" * n, box("\\frac{1}{" * n), box("(" * n + "4"))
    ]
    return kinds

# ruff: noqa: E501, UP031, SIM905
"""More than a thousand answers made to hang, exhaust, crash or fool a grader; all are wrong for the gold answer 4."""

from __future__ import annotations

import random

GOLD = "4"


def answers(seed: int = 0) -> dict[str, list[str]]:
    """Whole responses by kind."""
    chance = random.Random(seed)

    def box(text: str) -> str:
        return f"The answer is $\\boxed{{{text}}}$."

    def noise(alphabet: str, length: int) -> str:
        return "".join(chance.choice(alphabet) for _ in range(length))

    kinds: dict[str, list[str]] = {}
    kinds["towers of powers"] = [
        box("^{".join([str(chance.randint(5, 99))] * height) + "}" * (height - 1)) for height in range(3, 43)
    ] + [box(f"{a}^{{{b}^{{{c}}}}}") for a, b, c in ((9, 9, 9), (2, 99, 99), (10, 10, 100), (7, 7, 77))]
    kinds["factorials"] = [box(f"{10**n + 1}!") for n in range(3, 23)] + [
        box("(" * n + "9" + "!)" * n) for n in range(2, 22)
    ]
    kinds["big numbers"] = [box("9" * n) for n in (50, 500, 900, 5_000, 100_000)] + [
        box(f"{chance.randint(2, 9)}\\cdot10^{{{10**n}}}") for n in range(2, 17)
    ]
    kinds["binomials and sums"] = [box(f"\\binom{{{10**n}}}{{{10**n // 2}}}") for n in range(3, 13)] + [
        box(f"\\sum_{{k=1}}^{{{10**n}}} \\frac{{1}}{{k^{{{n}}}}}") for n in range(3, 13)
    ]
    kinds["integrals and limits"] = [
        box(f"\\int_0^{{{n}}} \\sin(x^{{{n}}}) e^{{x^{{{n}}}}} dx") for n in range(2, 22)
    ] + [box(f"\\lim_{{x \\to \\infty}} (1+\\frac{{{n}}}{{x}})^{{x^{{{n}}}}}") for n in range(2, 12)]
    kinds["deep nesting"] = [
        box(opening * depth + "5" + closing * depth)
        for opening, closing in (
            ("(", ")"),
            ("\\sqrt{", "}"),
            ("\\frac{1}{", "}"),
            ("{", "}"),
            ("\\left(", "\\right)"),
            ("-(", ")"),
        )
        for depth in (10, 40, 90, 120, 3_000, 50_000)
    ]
    kinds["powers of sums"] = [box(f"(x+y+z+{n})^{{{10 * n}}}") for n in range(1, 61)]
    kinds["matrices"] = [
        box("\\begin{pmatrix}" + "\\\\".join("&".join(["x"] * n) for _ in range(n)) + "\\end{pmatrix}^{%d}" % (n * n))
        for n in range(2, 16)
    ]
    kinds["equations"] = [box(f"x^{{{n}}}+{n}x^{{3}}-x+1=0") for n in range(3, 33)]
    kinds["megabytes"] = [
        box(text * (1_000_000 // len(text))) for text in ("5", "x+", "\\frac{", "{}", "\\{", " ", "a\n", "\\boxed{")
    ] + ["\\boxed{" * 150_000, "\\boxed{5}" * 110_000, "}" * 1_000_000, "{" * 1_000_000 + "\\boxed{5}", "é" * 500_000]
    kinds["unbalanced"] = [
        text
        for n in range(1, 31)
        for text in ("\\boxed{" + "{" * n + "4", "\\boxed{4" + "\\}" * n, box("\\frac{1}{" * n), box("(" * n + "4"))
    ]
    kinds["look-alikes"] = [
        box(text)
        for text in (
            "Ч",
            "ᔦ",
            "\u200b5",
            "４\u0338 5",
            "٥",
            "५",
            "4\u0301\u0301 5",
            "\u202e4 5",
            "𝟝",
            "５",
            "4\ufe0f⃣",
            "⁴",
            "₄",
            "④",
            "Ⅳ",
        )
    ]
    kinds["several"] = [
        "\\boxed{4} and \\boxed{5}", "\\boxed{4}\\boxed{}", "\\boxed{4 \\text{ or } 5}", "\\boxed{3, 4, 5}",
        "\\boxed{1\\text{ to }9}", "\\boxed{4}, no, \\boxed{four}", "\\boxed{\\text{4 or 5}}", "\\boxed{x \\in \\mathbb{R}}",
        "\\boxed{4=5}", "\\boxed{4 \\neq 5}", "\\boxed{\\{4\\}\\cup\\{5\\}}", "\\boxed{(4)(4)}", "\\boxed{4\\pm1}",
    ]  # fmt: skip
    kinds["several"] += [box(", ".join(str(i) for i in range(n))) for n in range(6, 46)]
    kinds["code"] = [
        box(text)
        for text in (
            "__import__('os').system('sleep 9')", "eval('2+2')", "exec('while True: pass')", "print(4)", "lambda: 4",
            "().__class__.__bases__", "open('/etc/passwd').read()", "[x for x in range(10**9)]", "import os; os.abort()",
            "\\input{/etc/passwd}", "\\write18{ls}", "\\def\\x{\\x\\x}\\x", "\\catcode`\\{=12", "\\loop\\repeat", "%d%s%n",
            "'; DROP TABLE answers; --", "${jndi:ldap://x}", "{{7*7}}", "`ls`", "$(ls)", "\\0", "\x00\x01\x02", "\ud7ff",
        )
    ]  # fmt: skip
    kinds["markup"] = [
        box(text)
        for text in (
            "<script>alert(4)</script>",
            "<b>4</b>5",
            "&#53;",
            "<!-- 4 -->",
            "<answer>4</answer>",
            "# 4\n- 5",
            "[4](5)",
            "```4```5",
        )
    ]
    kinds["empty"] = [
        "",
        " ",
        "\n" * 1000,
        "\\boxed{}",
        "\\boxed{ }",
        "\\boxed",
        "boxed{4}",
        "\\boxed{$$}",
        "\\boxed{\\text{}}",
        "\\boxed{~}",
    ]
    latex = "\\frac \\sqrt { } ^ _ ( ) [ ] | \\left \\right \\sum \\int x y 4 5 = < > , . ! + - * / & \\\\ % $ \\text".split()
    kinds["random latex"] = [
        box(" ".join(chance.choice(latex) for _ in range(chance.randint(3, 60))) + " 5 \\ne") for _ in range(300)
    ]
    kinds["random characters"] = [
        box(noise("0123456789+-*/^!(){}\\.,=xe ", chance.randint(5, 300)) + "\\ne") for _ in range(200)
    ]
    kinds["random unicode"] = [
        box(
            "".join(
                chr(chance.choice((*range(0xA0, 0xD7FF), *range(0x1F300, 0x1F600))))
                for _ in range(chance.randint(2, 80))
            )
            + "z"
        )
        for _ in range(60)
    ]
    return kinds

"""Measures how well grading accepts rewritten gold answers and rejects changed ones.

Run ``python -m experiments.grading_agreement [--data FILE] [--show] [--output experiments/results/FILE.json]``.

Every answer of MATH500 is written in each equivalent form that applies to it, and changed in several ways; the table
lists how many of each were accepted.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from bupo import run_folder as rundir
from bupo.data.grading import Grader
from bupo.data.problems import Problem, load_problems

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "math500.parquet"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
THOUSANDS = re.compile(r"\d,(?:\\!\s*)?\d{3}(?!\d)")
FRACTION = re.compile(r"(-?)\\[dt]?frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))")


def as_fraction(gold: str) -> Fraction | None:
    """The value of a plain number or fraction."""
    text = gold.strip()
    if re.fullmatch(r"-?\d*\.?\d+", text):
        return Fraction(text)
    if found := FRACTION.fullmatch(text):
        sign, long_top, top, long_bottom, bottom = found.groups()
        below = int(long_bottom or bottom)
        return Fraction(int(sign + "1") * int(long_top or top), below) if below else None
    return None


def is_number(gold: str) -> bool:
    return as_fraction(gold) is not None


def split_top(text: str, separators: str = ",") -> list[str]:
    """Split at separators outside of brackets; the separators are dropped."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in separators and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


# --- equivalent forms: each returns the rewritten answer, or None where it does not apply -------------------------


def other_fraction_command(gold: str) -> str | None:
    if "\\dfrac" in gold:
        return gold.replace("\\dfrac", "\\frac")
    return gold.replace("\\frac", "\\dfrac") if "\\frac" in gold else None


def small_fraction_command(gold: str) -> str | None:
    return re.sub(r"\\d?frac", r"\\tfrac", gold) if "frac" in gold else None


def slash_fraction(gold: str) -> str | None:
    value = as_fraction(gold)
    return f"{value.numerator}/{value.denominator}" if value is not None and value.denominator > 1 else None


def decimal(gold: str) -> str | None:
    """Only where the decimal is exact."""
    value = as_fraction(gold)
    if value is None or "." in gold:
        return None
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return None if rest != 1 else (f"{value.numerator}.0" if value.denominator == 1 else f"{float(value):.12g}")


def fraction_of_decimal(gold: str) -> str | None:
    value = as_fraction(gold)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}" if value is not None and "." in gold else None


def unreduced_fraction(gold: str) -> str | None:
    value = as_fraction(gold)
    return f"\\frac{{{3 * value.numerator}}}{{{3 * value.denominator}}}" if value is not None and value else None


def thousands(gold: str) -> str | None:
    if re.fullmatch(r"\d{4,}", gold):
        return f"{int(gold):,}"
    return re.sub(r",\\!\s*", "", gold) if ",\\!" in gold else None


def no_spaces(gold: str) -> str | None:
    if (
        "\\text" in gold
        or "\\mbox" in gold
        or "\\begin" in gold
        or " " not in gold
        or re.search(r"\\[a-zA-Z]+ \w", gold)
    ):
        return None
    return gold.replace(" ", "")


def more_spaces(gold: str) -> str | None:
    """Not inside a number: ``58 , 500`` does not mean 58500."""
    if "\\text" in gold or "\\begin" in gold or THOUSANDS.search(gold):
        return None
    spaced = re.sub(r"(?<=[\w})])([+,])(?=[\w\\({ -])", r" \1 ", gold)
    return f" {spaced} "


def thin_spaces(gold: str) -> str | None:
    if "," not in gold or "\\text" in gold or THOUSANDS.search(gold):
        return None
    return re.sub(r",\s*", r",\\,", gold)


def sized_brackets(gold: str) -> str | None:
    if "\\left" in gold:
        return gold.replace("\\left", "").replace("\\right", "")
    if re.fullmatch(r"[(\[][^()\[\]]*[)\]]", gold):
        return f"\\left{gold[:-1]}\\right{gold[-1]}"
    return None


def dollars(gold: str) -> str | None:
    return f"${gold}$" if "$" not in gold else None


def with_unit(gold: str) -> str | None:
    return f"{gold}\\text{{ cm}}" if re.fullmatch(r"\d+", gold) else None


def with_unit_squared(gold: str) -> str | None:
    return f"{gold}\\text{{ cm}}^2" if re.fullmatch(r"\d+", gold) else None


def without_unit(gold: str) -> str | None:
    bare = re.sub(r"\\(?:text|mbox)\{[^{}]*\}(?:\^2)?|\\\$", "", gold).strip()
    return bare if bare != gold and re.search(r"\d", bare) else None


def degrees(gold: str) -> str | None:
    return gold.replace("^\\circ", "^{\\circ}") if "^\\circ" in gold else None


def degrees_in_words(gold: str) -> str | None:
    return gold.replace("^\\circ", "\\text{ degrees}") if "^\\circ" in gold else None


def no_degrees(gold: str) -> str | None:
    return gold.replace("^\\circ", "") if "^\\circ" in gold else None


def reversed_set(gold: str) -> str | None:
    """Lists of values whose order does not matter (no tuple, interval or thousands separator)."""
    inner = gold[2:-2] if gold.startswith("\\{") else gold
    parts = split_top(inner)
    if len(parts) < 2 or ",\\!" in gold or re.fullmatch(r"\d{1,3}(,\d{3})+", gold) or "\\text" in gold:
        return None
    return f"\\{{{', '.join(reversed(parts))}\\}}" if inner != gold else ", ".join(p.strip() for p in reversed(parts))


def set_braces(gold: str) -> str | None:
    return f"\\{{{gold}\\}}" if reversed_set(gold) is not None and not gold.startswith("\\{") else None


def both_signs(gold: str) -> str | None:
    found = re.fullmatch(r"(\S+) \\pm (.+)", gold)
    return f"{found[1]} + {found[2]}, {found[1]} - {found[2]}" if found and "," not in gold else None


def reversed_union(gold: str) -> str | None:
    parts = gold.split("\\cup")
    return " \\cup ".join(p.strip() for p in reversed(parts)) if len(parts) > 1 else None


def reversed_sum(gold: str) -> str | None:
    if any(mark in gold for mark in (",", "=", "\\pm", "\\text", "\\in ", "\\begin", "\\infty", "\\cup")):
        return None
    terms = re.findall(r"[+-]?(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\([^()]*\)|[^+\-{}()])+", gold.replace(" ", ""))
    if (
        len(terms) < 2
        or "".join(terms) != gold.replace(" ", "")
        or ("\\" in gold and " " in gold.strip() and "frac" in gold)
    ):
        return None
    signed = [term if term[0] in "+-" else f"+{term}" for term in terms]
    return "".join(reversed(signed)).removeprefix("+")


def as_assignment(gold: str) -> str | None:
    return f"x = {gold}" if is_number(gold) else None


def without_variable(gold: str) -> str | None:
    found = re.fullmatch(r"[a-z]\s*=\s*(-?\d+)", gold)
    return found[1] if found else None


def words_unwrapped(gold: str) -> str | None:
    found = re.fullmatch(r"\\text\{([^{}]*)\}", gold)
    return found[1].strip("()") if found else None


def bold_words(gold: str) -> str | None:
    return gold.replace("\\text{", "\\textbf{") if re.fullmatch(r"\\text\{[^{}]*\}", gold) else None


def full_stop(gold: str) -> str | None:
    return f"{gold}."


def displaystyle(gold: str) -> str | None:
    return None if "\\text" in gold else f"\\displaystyle {gold}"


def in_braces(gold: str) -> str | None:
    return f"{{{gold}}}"


EQUIVALENT: tuple[Callable[[str], str | None], ...] = (
    other_fraction_command, small_fraction_command, slash_fraction, decimal, fraction_of_decimal, unreduced_fraction,
    thousands, no_spaces, more_spaces, thin_spaces, sized_brackets, dollars, with_unit, with_unit_squared, without_unit,
    degrees, degrees_in_words, no_degrees, reversed_set, set_braces, both_signs, reversed_union, reversed_sum,
    as_assignment, without_variable, words_unwrapped, bold_words, in_braces, full_stop,
    displaystyle,
)  # fmt: skip


# --- changed answers: each yields answers that are wrong ----------------------------------------------------------


def sign(gold: str, chance: random.Random) -> Iterator[str]:
    """The sign of the whole (numbers), or of the first entry (tuples)."""
    if is_number(gold) and as_fraction(gold) != 0:
        yield gold[1:] if gold.startswith("-") else f"-{gold}"
    elif found := re.fullmatch(r"(\(|\\left\( ?)(-?)(\d.*)", gold):
        if not found[3].startswith("0,"):
            yield f"{found[1]}{'' if found[2] else '-'}{found[3]}"
    elif re.fullmatch(r"\d+\\(?:sqrt|pi).*|\\sqrt\{\d+\}|\d+ ?\\pi", gold):
        yield f"-{gold}"


def digit(gold: str, chance: random.Random) -> Iterator[str]:
    """One digit replaced by another, at a random place (in fractions this changes the value)."""
    places = [m.start() for m in re.finditer(r"\d", gold)]
    if places and "\\pm" not in gold:
        place = chance.choice(places)
        other = chance.choice([d for d in "123456789" if d != gold[place]])
        changed = gold[:place] + other + gold[place + 1 :]
        before, after = as_fraction(gold), as_fraction(changed)
        if before is None or before != after:
            yield changed


def neighbour(gold: str, chance: random.Random) -> Iterator[str]:
    """The first whole number, one larger and one smaller."""
    found = NUMBER.search(gold)
    if found and re.fullmatch(r"\d+", found.group()) and not gold.startswith(".") and "\\pm" not in gold:
        for step in (1, -1):
            changed = gold[: found.start()] + str(int(found.group()) + step) + gold[found.end() :]
            value = as_fraction(changed) if is_number(gold) and not changed.endswith("{0}") else None
            if value is None or value != as_fraction(gold):
                yield changed


def swapped(gold: str, chance: random.Random) -> Iterator[str]:
    """A tuple's first two entries exchanged."""
    found = re.fullmatch(r"\(([^,()]+),([^,()]+)((?:,[^()]+)?)\)", gold)
    if found and found[1].strip() != found[2].strip():
        yield f"({found[2].strip()},{found[1].strip()}{found[3]})"


def other_word(gold: str, chance: random.Random) -> Iterator[str]:
    if re.fullmatch(r"\\text\{.*\}", gold):
        yield "\\text{(D)}" if "(" in gold else "\\text{nowhere}"


PERTURBED = (sign, digit, neighbour, swapped, other_word)


def main() -> tuple[float, float]:
    """Print the table; return the accepted shares of equivalent and of perturbed answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--show", action="store_true", help="print every disagreement")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    problems = load_problems(str(options.data))
    chance = random.Random(0)
    cases: list[tuple[str, bool, str, Problem]] = []
    for problem in problems:
        gold = problem.answer.strip()
        for form in EQUIVALENT:
            text = form(gold)
            if text is not None and text != gold:
                cases.append((form.__name__, True, text, problem))
        for change in PERTURBED:
            cases += [(change.__name__, False, text, problem) for text in change(gold, chance)]
    with Grader() as grader:
        grades = grader.grade([f"Thus \\boxed{{{text}}}." for _, _, text, _ in cases], [c[3] for c in cases])
    print(f"{'form':<24} {'cases':>6} {'accepted':>9}")
    shares = []
    table: dict[str, dict[str, dict[str, int]]] = {"equivalent": {}, "perturbed": {}}
    for expected in (True, False):
        names = [f.__name__ for f in (EQUIVALENT if expected else PERTURBED)]
        all_accepted = all_cases = 0
        for name in names:
            chosen = [grade.status == "correct" for case, grade in zip(cases, grades, strict=True) if case[0] == name]
            all_accepted, all_cases = all_accepted + sum(chosen), all_cases + len(chosen)
            if chosen:
                table["equivalent" if expected else "perturbed"][name] = {"cases": len(chosen), "accepted": sum(chosen)}
                print(f"{name:<24} {len(chosen):>6} {100 * sum(chosen) / len(chosen):>8.2f}%")
        label = "EQUIVALENT" if expected else "PERTURBED"
        print(f"{label:<24} {all_cases:>6} {100 * all_accepted / all_cases:>8.2f}%\n")
        shares.append(all_accepted / all_cases)
    unusable = {case[3].answer for case, grade in zip(cases, grades, strict=True) if grade.status == "bad_gold"}
    print(f"gold answers that cannot be read: {len(unusable)}")
    forms = Counter(id(problem) for _, expected, _, problem in cases if expected)
    fewest, mean = min(forms[id(p)] for p in problems), sum(forms.values()) / len(problems)
    print(f"equivalent forms of an answer: at least {fewest}, {mean:.1f} on average")
    if options.output:
        figures = {
            "answers": len(problems),
            "equivalent_accepted": shares[0],
            "perturbed_rejected": 1 - shares[1],
            "gold_unreadable": len(unusable),
            "forms_fewest": fewest,
            "forms_mean": mean,
            "table": table,
            "versions": rundir.versions(),
        }
        rundir.write_json(options.output, figures)
    if options.show:
        for (name, expected, text, problem), grade in zip(cases, grades, strict=True):
            if (grade.status == "correct") != expected:
                print(f"{name}: {problem.answer}  |  {text}  ->  {grade.status}")
    return shares[0], shares[1]


if __name__ == "__main__":
    main()

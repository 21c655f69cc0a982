"""Knights and Knaves: a logic puzzle with an exact answer, as an environment for reasoning and reward functions.

Every person is a knight, whose statement is true, or a knave, whose statement is false. Person i says `statements[i]`.
A statement is a nested tuple, in the format of the public data set of Xie et al. (2024), arXiv:2410.23123:

    ("telling-truth", i)  ("lying", i)  ("not", s)  ("and", s, ...)  ("or", s, ...)  ("->", a, b)  ("<=>", a, b)

An assignment is a tuple of bool, True for a knight. It is consistent if each person is a knight exactly when
the statement of that person is true.
"""

import argparse
import itertools
import random
import re
import sys
from numbers import Integral

NAMES = ("Ada", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Liam")
INSTRUCTION = (
    'Reason step by step. Then write "CONCLUSION:" and, below it, one numbered line for each person, '
    'such as "(1) {name} is a knight".'
)
LEAVES = ("telling-truth", "lying")
ARITY = {"not": (1, 1), "and": (1, None), "or": (1, None), "->": (2, 2), "<=>": (2, 2)}  # fewest, most operands


def check_statement(statement, n, part=None):
    """Raise ValueError, naming the statement, unless it (or the `part` given) is well formed for people 0 .. n - 1."""
    where = f"malformed statement {statement!r}: " + ("" if part is None else f"in {part[0]!r}, ")
    inner = statement if part is None else part[0]
    if not isinstance(inner, (tuple, list)) or not inner or not isinstance(inner[0], str):
        raise ValueError(f"{where}expected a tuple that starts with an operator")
    operator, operands = inner[0], inner[1:]
    if operator in LEAVES:
        # bool is an int in Python, so ("lying", True) would silently mean person 1.
        person = operands[0] if len(operands) == 1 else None
        if not isinstance(person, Integral) or isinstance(person, bool) or not 0 <= person < n:
            raise ValueError(f"{where}expected one person from 0 to {n - 1}")
        return
    if operator not in ARITY:
        raise ValueError(f"{where}unknown operator {operator!r}")
    fewest, most = ARITY[operator]
    if len(operands) < fewest or (most is not None and len(operands) > most):
        raise ValueError(f"{where}{operator!r} does not take {len(operands)} operands")
    for operand in operands:
        check_statement(statement, n, part=(operand,))


def evaluate(statement, assignment):
    """Truth value of a well-formed statement when person i is a knight exactly if `assignment[i]`."""
    operator, *operands = statement
    if operator == "telling-truth":
        return bool(assignment[operands[0]])
    if operator == "lying":
        return not assignment[operands[0]]
    values = [evaluate(operand, assignment) for operand in operands]
    if operator == "not":
        return not values[0]
    if operator == "and":
        return all(values)
    if operator == "or":
        return any(values)
    if operator == "->":
        return not values[0] or values[1]
    return values[0] == values[1]  # "<=>"


def solve(statements):
    """All consistent assignments of a puzzle, by trying each of the 2**n.

    Args:
        statements: one statement for each of n people; person i says `statements[i]`.

    Returns:
        A list of tuples of n bools, True for a knight, in the order of `itertools.product([True, False], repeat=n)`:
        all knights first, the last person changing fastest. Empty if the puzzle is a paradox.

    Raises:
        ValueError: no statements, or a malformed one, which the message names.
    """
    if not isinstance(statements, (tuple, list)) or not statements:
        raise ValueError(f"expected a tuple or list with one statement for each person, not {statements!r}")
    for statement in statements:
        check_statement(statement, len(statements))
    return [
        assignment
        for assignment in itertools.product([True, False], repeat=len(statements))
        if all(evaluate(s, assignment) == knight for s, knight in zip(statements, assignment, strict=True))
    ]


def random_statement(speaker, n, rng, depth=2):
    """A random statement about n >= 2 people, with at most `depth` levels and two operands."""
    kind = rng.choice(("leaf", *ARITY)) if depth > 1 else "leaf"
    if kind == "leaf":
        person, leaf = rng.randrange(n), rng.choice(LEAVES)
        # Nobody can say "I am a knave": a knight would lie, a knave would tell the truth.
        return ("telling-truth" if person == speaker else leaf, person)
    operands = []
    while len(operands) < (1 if kind == "not" else 2):
        operand = random_statement(speaker, n, rng, depth - 1)
        if operand not in operands:
            operands.append(operand)
    return (kind, *operands)


def generate(n, rng, *, depth=2):
    """Random puzzle of n people with exactly one consistent assignment.

    Args:
        n: number of people, 2 to 8.
        rng: a `random.Random`; the same state gives the same puzzle.
        depth: levels of a statement at most, 2 or more. If everybody only said "X is a knight" or "X is a knave", then
            exchanging all knights and knaves would give a second solution, so no such puzzle exists.

    Returns:
        A tuple of n statements. `solve` of it has one element.

    Raises:
        ValueError: n is not 2 to 8, or depth is below 2.
    """
    if not isinstance(n, int) or not 2 <= n <= 8:
        raise ValueError(f"expected 2 to 8 people, not {n!r}")
    if depth < 2:
        raise ValueError(f"expected a depth of at least 2, not {depth!r}")
    while True:  # rejection: of random puzzles, roughly a quarter to a third have exactly one solution
        statements = tuple(random_statement(speaker, n, rng, depth) for speaker in range(n))
        if len(solve(statements)) == 1:
            return statements


def check_names(names, n=None):
    """Raise ValueError unless the names are n different, non-empty strings (case does not tell two apart)."""
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"expected non-empty names, not {names!r}")
    if len({name.casefold() for name in names}) != len(names):
        raise ValueError(f"expected different names, not {names!r}")
    if n is not None and len(names) != n:
        raise ValueError(f"{n} statements need {n} names, not {len(names)}: {names!r}")


def phrase(statement, names):
    """English for one statement. A compound operand stands in brackets, so that the text has one reading only."""

    def is_plain(s):
        return s[0] in LEAVES or s[0] == "not" and s[1][0] in LEAVES

    operator, *operands = statement
    if is_plain(statement):
        leaf, person = operands[0] if operator == "not" else statement
        verb = "is not a" if operator == "not" else "is a"
        return f"{names[person]} {verb} {'knight' if leaf == 'telling-truth' else 'knave'}"
    parts = [phrase(o, names) if is_plain(o) else f"({phrase(o, names)})" for o in operands]
    if operator == "not":
        return f"it is not the case that {parts[0]}"
    if operator == "->":
        return f"if {parts[0]} then {parts[1]}"
    return f" {'if and only if' if operator == '<=>' else operator} ".join(parts)


def render(statements, names):
    """The puzzle as English text: the rules, the people, each person's statement, the question."""
    check_names(names, len(statements))
    for statement in statements:
        check_statement(statement, len(statements))
    people = ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
    said = " ".join(f'{name} says: "{phrase(s, names)}."' for name, s in zip(names, statements, strict=True))
    return (
        "On an island everyone is either a knight or a knave. Knights always tell the truth, and knaves always lie. "
        f"You meet {people}. {said} Who is a knight and who is a knave?"
    )


def solution_text(solution, names):
    """The numbered list that the instruction asks for: "(1) Ada is a knight", a line for each person."""
    check_names(names, len(solution))
    return "\n".join(
        f"({i}) {name} is a {'knight' if knight else 'knave'}"
        for i, (name, knight) in enumerate(zip(names, solution, strict=True), 1)
    )


def make_record(n, rng):
    """One row of a data set: TRL's `prompt`, and the public data set's quiz, names, statements, solution(s) as text."""
    statements = generate(n, rng)
    names = rng.sample(NAMES, n)
    quiz, (solution,) = render(statements, names), solve(statements)
    return {
        "prompt": f"{quiz} {INSTRUCTION.format(name=names[0])}",
        "quiz": quiz,
        "names": names,
        "statements": repr(statements),  # a string, as the data set has it: tuples of mixed types fit no table column
        "solution": list(solution),
        "solution_text": solution_text(solution, names),
    }


# While it is read, each person's name is one character of Unicode's private use area.
PERSON = "[\ue000-\uf8ff]"
CLAIM = re.compile(
    rf"(?:(?P<one>{PERSON})\s*(?:\bis\b|\bmust\s+be\b|\bhas\s+to\s+be\b|->|→|–|[-:=])"
    rf"|(?P<many>{PERSON}(?:(?:\s*,\s*and|\s*,|\s+and)\s*{PERSON})+)\s+are(?:\s+both|\s+all)?)"
    r"\s*(?P<not>\bnot\b)?\s*(?:\b(?:an?|the)\b)?\s*\b(?P<role>knight|knave)s?\b",
    re.IGNORECASE,
)
# A clause that also has one of these states something else than a plain fact about a person.
UNSURE = re.compile(
    r"\b(if|unless|or|either|neither|nor|not|never|cannot|\w+n['’]t|false|wrong|untrue|lie|lies|assum\w*|suppos\w*"
    r"|would|could|may|might|maybe|perhaps|possibly|says?|said|claim\w*|states?|according)\b|\?",
    re.IGNORECASE,
)


def parse_answer(text, names):
    """The assignment that an answer concludes, or None if it does not conclude exactly one.

    Reads the text after the last "CONCLUSION:" (or in the last `<answer>` tag), or all of it if there is neither.
    It understands "(1) Ada is a knight", "Ada: knave", "Ada is not a knave", "Ada and Boris are knights", in any case,
    order and Markdown emphasis. None if a person is missing or called both, or if the clause about a person
    is conditional, denied, a question or what somebody else says.

    Args:
        text: the model's completion.
        names: n different names.

    Returns:
        A tuple of n bools, True for a knight, or None.
    """
    check_names(names)
    if not isinstance(text, str):
        return None
    section = re.split(r"conclusion[\s*_]*:|<answer>", text, flags=re.IGNORECASE)[-1]
    section = re.split(r"</answer>", section, flags=re.IGNORECASE)[0]
    section = re.sub(PERSON, "", section)
    # Longest first: else "Ann" would be found in "Ann Lee". The characters beside a name are no letters or digits.
    for i in sorted(range(len(names)), key=lambda i: -len(names[i])):
        pattern = rf"(?<![^\W_]){re.escape(names[i])}(?![^\W_])"
        section = re.sub(pattern, chr(0xE000 + i), section, flags=re.IGNORECASE)
    found = {}
    for clause in re.split(r"\n|;|[.!](?=\s|$)|(?<=\?)", re.sub(r"[*_`]", "", section)):
        claims = list(CLAIM.finditer(clause))
        if claims and UNSURE.search(CLAIM.sub(" ", clause)):
            return None
        for match in claims:
            knight = (match["role"].lower() == "knight") != bool(match["not"])
            for person in re.findall(PERSON, match["one"] or match["many"]):
                if found.setdefault(ord(person) - 0xE000, knight) != knight:
                    return None
    return tuple(found[i] for i in range(len(names))) if len(found) == len(names) else None


def reward(completions, **columns):
    """1.0 for each completion that concludes exactly the solution, else 0.0; the form that TRL's GRPOTrainer calls.

    Args:
        completions: B texts, or B message lists as in TRL's conversational format (the last message is read).
        columns: the data set's columns, B long each; `names` and `solution` are needed, the rest is ignored.

    Raises:
        ValueError: a needed column is missing or has another length.
    """
    for column in ("names", "solution"):
        if column not in columns:
            raise ValueError(f"reward needs the column {column!r}; it has {sorted(columns)}")
        if len(columns[column]) != len(completions):
            raise ValueError(f"{len(completions)} completions, but {len(columns[column])} rows of {column!r}")
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    rows = zip(texts, columns["names"], columns["solution"], strict=True)
    return [float(parse_answer(text, names) == tuple(solution)) for text, names, solution in rows]


def main(argv=None):
    """Print a puzzle and its solution."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--people", type=int, default=3, help="2 to 8")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        record = make_record(args.people, random.Random(args.seed))
    except ValueError as error:
        print(f"knights_knaves: {error}", file=sys.stderr)
        return 2
    print(f"{record['prompt']}\n\nCONCLUSION:\n{record['solution_text']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The Knights and Knaves world against oracles that share no code with it."""

import inspect
import random
import re
import types

import pytest

from snippets.worlds import knights_knaves as kk

K, V = True, False  # knight, knave
ZERO, ONE = ("telling-truth", 0), ("telling-truth", 1)
CLASSICS = {
    "Smullyan: at least one of us is a knave": ([("or", ("lying", 0), ("lying", 1)), ("telling-truth", 1)], [(K, V)]),
    "Smullyan: both of us are knaves": ([("and", ("lying", 0), ("lying", 1)), ("telling-truth", 1)], [(V, K)]),
    "nobody can say: I am a knave": ([("lying", 0)], []),
    "everybody can say: I am a knight": ([("telling-truth", 0)], [(K,), (V,)]),
    "if I am a knight, so is she": ([("->", ZERO, ONE), ZERO], [(K, K)]),
    "the same kind, says one; different kinds, says the other": (
        [("<=>", ZERO, ONE), ("not", ("<=>", ZERO, ONE))],
        [(V, K)],
    ),
    "all of us are knaves; exactly one of us is a knight": (
        [
            ("and", ("lying", 0), ("lying", 1), ("lying", 2)),
            (
                "or",
                ("and", ("telling-truth", 0), ("lying", 1), ("lying", 2)),
                ("and", ("lying", 0), ("telling-truth", 1), ("lying", 2)),
                ("and", ("lying", 0), ("lying", 1), ("telling-truth", 2)),
            ),
            ("telling-truth", 2),
        ],
        [(V, K, V)],
    ),
    "he is a knave; the other two are of one kind (the third is settled, the first is not)": (
        [("lying", 1), ("<=>", ("telling-truth", 0), ("telling-truth", 2)), ("telling-truth", 2)],
        [(K, V, V), (V, K, V)],
    ),
    "the implication with a false premise is true": ([("->", ("lying", 0), ("lying", 1)), ZERO], [(K, K)]),
    # The two examples in the prompts of the public code, with the answers printed there.
    "Ella and Penelope": (
        [("or", ("telling-truth", 0), ("telling-truth", 1)), ("<=>", ("lying", 0), ("telling-truth", 1))],
        [(V, V)],
    ),
    "Jack and Sophia": ([("not", ("lying", 1)), ("->", ("telling-truth", 0), ("telling-truth", 1))], [(K, K)]),
}


def python_expression(statement):
    """First oracle: the statement as Python source, for `eval` with k as the assignment."""
    op, *args = statement
    if op in ("telling-truth", "lying"):
        return f"k[{args[0]}]" if op == "telling-truth" else f"(not k[{args[0]}])"
    parts = [python_expression(a) for a in args]
    if op == "not":
        return f"(not {parts[0]})"
    return f"({ {'and': ' and ', 'or': ' or ', '->': ' <= ', '<=>': ' == '}[op].join(parts)})"


def truth_table(statement, n):
    """Second oracle: bit b of the result is the statement's value when person i is a knight iff bit i of b is set."""
    full = (1 << (1 << n)) - 1
    op, *args = statement
    if op in ("telling-truth", "lying"):
        column = sum(1 << b for b in range(1 << n) if b >> args[0] & 1)
        return column if op == "telling-truth" else full ^ column
    tables = [truth_table(a, n) for a in args]
    result = tables[0]
    if op == "not":
        return full ^ result
    for table in tables[1:]:
        same = full ^ result ^ table
        result = {"and": result & table, "or": result | table, "->": full ^ result | table, "<=>": same}[op]
    return result


def solve_by_expression(statements):
    n = len(statements)
    source = " and ".join(f"(k[{i}] == {python_expression(s)})" for i, s in enumerate(statements))
    code = compile(source, "puzzle", "eval")
    worlds = [tuple(bool(b >> (n - 1 - i) & 1) for i in range(n)) for b in reversed(range(1 << n))]
    return [k for k in worlds if eval(code, {"k": k})]


def solve_by_table(statements):
    n = len(statements)
    consistent = (1 << (1 << n)) - 1
    for i, s in enumerate(statements):
        consistent &= ~(truth_table(s, n) ^ truth_table(("telling-truth", i), n))
    return {tuple(bool(b >> i & 1) for i in range(n)) for b in range(1 << n) if consistent >> b & 1}


def random_puzzles(n, count, seed=0, depth=3):
    rng = random.Random(seed)
    return [tuple(kk.random_statement(i, n, rng, depth) for i in range(n)) for _ in range(count)]


@pytest.mark.parametrize("name", CLASSICS)
def test_classical_puzzles(name):
    statements, solutions = CLASSICS[name]
    assert kk.solve(statements) == solutions


@pytest.mark.parametrize("n", range(2, 9))
def test_solve_agrees_with_two_independent_solvers(n):
    for statements in random_puzzles(n, 25, seed=n):
        found = kk.solve(statements)
        assert found == solve_by_expression(statements)  # the same assignments in the documented order
        assert set(found) == solve_by_table(statements)


def test_every_operator_by_its_truth_table():
    a, b = ("telling-truth", 0), ("telling-truth", 1)
    worlds = [(K, K), (K, V), (V, K), (V, V)]
    table = {
        ("lying", 0): [0, 0, 1, 1],
        ("not", b): [0, 1, 0, 1],
        ("and", a, b): [1, 0, 0, 0],
        ("or", a, b): [1, 1, 1, 0],
        ("->", a, b): [1, 0, 1, 1],
        ("<=>", a, b): [1, 0, 0, 1],
        ("and", a): [1, 1, 0, 0],
        ("or", a, b, ("lying", 0)): [1, 1, 1, 1],
    }
    for statement, values in table.items():
        assert [kk.evaluate(statement, w) for w in worlds] == [bool(v) for v in values], statement


MUTANTS = [
    ("not values[0] or values[1]", "values[0] or not values[1]"),  # implication turned round
    ("not values[0] or values[1]", "values[0] and values[1]"),
    ("return values[0] == values[1]", "return values[0] != values[1]"),
    ("return values[0] == values[1]", "return not values[0] or values[1]"),
    ("return all(values)", "return any(values)"),
    ("return any(values)", "return all(values)"),
    ("return any(values)", "return sum(values) == 1"),  # exclusive or
    ("return all(values)", "return values[0] and values[1]"),  # a third operand forgotten
    ("return not values[0]\n", "return values[0]\n"),
    ("return not assignment[operands[0]]", "return bool(assignment[operands[0]])"),
    ("evaluate(s, assignment) == knight for", "(evaluate(s, assignment) or not knight) for"),  # honest knaves
    ("evaluate(s, assignment) == knight for", "(not evaluate(s, assignment) or knight) for"),  # lying knights
    ("product([True, False], repeat=len", "product([False, True], repeat=len"),
]


@pytest.mark.parametrize(("right", "wrong"), MUTANTS)
def test_a_wrong_solver_is_caught(right, wrong):
    source = inspect.getsource(kk)
    assert source.count(right) == 1, f"the mutation no longer applies: {right}"
    mutant = types.ModuleType("mutant")
    exec(source.replace(right, wrong), mutant.__dict__)
    caught = any(mutant.solve(statements) != solutions for statements, solutions in CLASSICS.values())
    caught |= any(mutant.solve(s) != solve_by_expression(s) for s in random_puzzles(3, 30))
    assert caught


@pytest.mark.parametrize("n", range(2, 9))
def test_generate_gives_puzzles_with_exactly_one_solution(n):
    rng = random.Random(n)
    puzzles = [kk.generate(n, rng) for _ in range(200)]
    for statements in puzzles:
        assert len(statements) == n
        assert len(solve_by_table(statements)) == 1
    assert len(set(puzzles)) > (150 if n > 2 else 80)  # not the same few again and again
    assert {o for p in puzzles for s in p for o in operators(s)} == {*kk.LEAVES, *kk.ARITY}
    share = sum(len(solve_by_table(p)) == 1 for p in random_puzzles(n, 200, depth=2)) / 200
    assert 0.15 < share < 0.5  # what the comment in generate says of rejection


def operators(statement):
    yield statement[0]
    if statement[0] not in kk.LEAVES:
        for operand in statement[1:]:
            yield from operators(operand)


def test_generate_repeats_with_the_seed():
    assert kk.generate(5, random.Random(3)) == kk.generate(5, random.Random(3))
    assert kk.generate(5, random.Random(3)) != kk.generate(5, random.Random(4))


def test_generate_refuses_a_depth_without_unique_puzzles():
    """With leaves alone, turning every knight into a knave keeps consistency: solutions come in pairs."""
    for n in range(2, 6):
        for statements in random_puzzles(n, 50, depth=1):
            solutions = set(kk.solve(statements))
            assert solutions == {tuple(not k for k in solution) for solution in solutions}
    with pytest.raises(ValueError, match="depth of at least 2, not 1"):
        kk.generate(3, random.Random(0), depth=1)


@pytest.mark.parametrize("n", [0, 1, 9, -1, 2.0, "3", None])
def test_generate_refuses_other_sizes(n):
    with pytest.raises(ValueError, match=re.escape(repr(n))):
        kk.generate(n, random.Random(0))


MALFORMED = [
    ("xor", ("lying", 0), ("lying", 1)),
    ("Lying", 0),
    ("lying",),
    ("lying", 0, 1),
    ("lying", 2),
    ("lying", -1),
    ("lying", True),
    ("lying", "0"),
    ("lying", 0.0),
    ("lying", None),
    ("telling-truth", ("lying", 0)),
    ("not",),
    ("not", ("lying", 0), ("lying", 1)),
    ("and",),
    ("or",),
    ("->", ("lying", 0)),
    ("->", ("lying", 0), ("lying", 1), ("lying", 0)),
    ("<=>", ("lying", 0)),
    ("and", ("lying", 0), 1),
    ("or", ("lying", 0), "lying"),
    (),
    (0, 1),
    "lying",
    None,
    3,
]


@pytest.mark.parametrize("statement", MALFORMED, ids=repr)
def test_malformed_statements_are_named(statement):
    with pytest.raises(ValueError, match="malformed statement " + re.escape(repr(statement))):
        kk.solve([("telling-truth", 0), statement])
    whole = ("or", ("telling-truth", 0), ("not", statement))
    with pytest.raises(ValueError, match="malformed statement " + re.escape(repr(whole))):
        kk.solve([("telling-truth", 0), whole])


def test_a_malformed_part_is_pointed_at():
    with pytest.raises(ValueError) as error:
        kk.solve([("not", ("xor", ("lying", 0), ("lying", 0)))])
    assert str(error.value) == (
        "malformed statement ('not', ('xor', ('lying', 0), ('lying', 0))): "
        "in ('xor', ('lying', 0), ('lying', 0)), unknown operator 'xor'"
    )


@pytest.mark.parametrize("statements", [(), [], None, "lying", {0: ("lying", 0)}])
def test_a_puzzle_without_statements_is_refused(statements):
    with pytest.raises(ValueError, match="one statement for each person"):
        kk.solve(statements)


def test_lists_are_read_like_tuples():
    assert kk.solve([["not", ["lying", 1]], ["->", ["telling-truth", 0], ["telling-truth", 1]]]) == [(K, K)]


# Rendering: an English reader written here gets the same puzzle back from the text.


def read_statement(text, names):
    def leaf(words):
        m = re.fullmatch(rf"({'|'.join(names)}) is (not )?a (knight|knave)", words)
        assert m, words
        inner = ("telling-truth" if m[3] == "knight" else "lying", names.index(m[1]))
        return ("not", inner) if m[2] else inner

    def split(words, separator):
        depth, parts, start = 0, [], 0
        for i, char in enumerate(words):
            depth += (char == "(") - (char == ")")
            if depth == 0 and words.startswith(separator, i):
                parts.append(words[start:i])
                start = i + len(separator)
        return [*parts, words[start:]]

    def read(words):
        while words.startswith("(") and len(split(words, ")")) == 2 and words.endswith(")"):
            words = words[1:-1]
        if words.startswith("it is not the case that "):
            return ("not", read(words.removeprefix("it is not the case that ")))
        if words.startswith("if "):
            return ("->", *map(read, split(words.removeprefix("if "), " then ")))
        for separator, op in ((" if and only if ", "<=>"), (" and ", "and"), (" or ", "or")):
            if len(split(words, separator)) > 1:
                return (op, *map(read, split(words, separator)))
        return leaf(words)

    return read(text)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_render_loses_nothing(depth):
    rng = random.Random(depth)
    for n in range(2, 9):
        for _ in range(20):
            statements = kk.generate(n, rng, depth=depth)
            names = rng.sample(kk.NAMES, n)
            said = re.findall(r'(\w+) says: "(.*?)\."', kk.render(statements, names))
            assert [name for name, _ in said] == names
            assert tuple(read_statement(text, names) for _, text in said) == statements


def test_render_in_full():
    text = kk.render((("lying", 1), ("and", ("lying", 0), ("not", ("telling-truth", 1)))), ["Zoey", "Oliver"])
    assert text == (
        "On an island everyone is either a knight or a knave. Knights always tell the truth, and knaves always lie. "
        'You meet Zoey and Oliver. Zoey says: "Oliver is a knave." Oliver says: "Zoey is a knave and Oliver is not a '
        'knight." Who is a knight and who is a knave?'
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Ada"], "2 statements need 2 names"),
        (["Ada", "ada"], "different"),
        (["Ada", ""], "non-empty"),
        (["Ada", 3], "non-empty"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        kk.render((("lying", 1), ("lying", 0)), names)


# Answers.


def test_the_solution_text_parses_to_the_solution():
    rng = random.Random(1)
    for n in range(2, 9):
        for _ in range(30):
            record = kk.make_record(n, rng)
            solution = tuple(record["solution"])
            for text in (
                record["solution_text"],
                f"Suppose {record['names'][0]} is a knave. That fails.\nCONCLUSION:\n{record['solution_text']}",
                record["solution_text"].upper(),
                ", and ".join(re.sub(r"\(\d\) ", "", record["solution_text"]).split("\n")) + ".",
            ):
                assert kk.parse_answer(text, record["names"]) == solution


ANSWERS = [
    ("(1) Zoey is a knight\n(2) Oliver is a knave", (K, V)),
    ("(1) zoey is a KNIGHT (2) OLIVER is a Knave", (K, V)),
    ("CONCLUSION:\n(2) Oliver is a knave.\n(1) Zoey is a knight.", (K, V)),
    ("If Zoey is a knave then ...\n**Conclusion:**\n1. **Zoey** is a **knight**\n2. **Oliver** is a *knave*", (K, V)),
    ("<think>Assume Zoey is a knave.</think><answer>(1) Zoey is a knight, (2) Oliver is a knave</answer>", (K, V)),
    ("CONCLUSION:\nZoey: knave\nOliver: knight", (V, K)),
    ("CONCLUSION:\n- Zoey - knave\n- Oliver = knight", (V, K)),
    ("CONCLUSION: Zoey is not a knave. Oliver is not a knight.", (K, V)),
    ("CONCLUSION: Zoey and Oliver are both knaves.", (V, V)),
    ("CONCLUSION: Zoey must be a knight, so Oliver has to be a knave.", (K, V)),
    ("CONCLUSION: (1) Zoey is a knight (2) Oliver is a knave. This is not a contradiction.", (K, V)),
    # The last conclusion counts.
    ("CONCLUSION: Zoey is a knave, Oliver is a knave. Wait.\nCONCLUSION: Zoey is a knight, Oliver is a knave.", (K, V)),
    # Missing.
    ("", None),
    ("CONCLUSION:", None),
    ("(1) Zoey is a knight", None),
    ("CONCLUSION:\n(1) knight\n(2) knave", None),
    ("Zoey is a knight. Oliver is a knave. CONCLUSION: I do not know.", None),
    ("CONCLUSION: Zoey is a knight. Olive is a knave.", None),
    ("CONCLUSION: Zoey is a knight. Oliver is a knavery.", None),
    # Contradictory.
    ("CONCLUSION: Zoey is a knight. Oliver is a knave. Oliver is a knight.", None),
    ("CONCLUSION: Zoey and Oliver are knights. Zoey is a knave.", None),
    ("Assume Zoey is a knight; Oliver is a knave. No: Zoey is a knave.", None),
    # Ambiguous.
    ("CONCLUSION: Zoey is a knight or a knave. Oliver is a knave.", None),
    ("CONCLUSION: Either Zoey is a knight or Oliver is a knave.", None),
    ("CONCLUSION: If Zoey is a knight then Oliver is a knave.", None),
    ("CONCLUSION: It is not true that Zoey is a knight. Oliver is a knave.", None),
    ("CONCLUSION: It isn't so that Zoey is a knight. Oliver is a knave.", None),
    ("CONCLUSION: Is Zoey a knight? Zoey is a knight? Oliver is a knave.", None),
    ("CONCLUSION: Oliver says Zoey is a knight. Oliver is a knave.", None),
    ("CONCLUSION: Zoey is a knight, maybe. Oliver is a knave.", None),
    ("Suppose Zoey is a knight. Oliver is a knave.", None),
    (None, None),
    (7, None),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_parse_answer(text, answer):
    assert kk.parse_answer(text, ["Zoey", "Oliver"]) == answer


def test_one_name_inside_another_is_not_confused():
    names = ["Ann", "Ann Lee", "Joann", "A.J."]
    text = "(1) Ann is a knight (2) Ann Lee is a knave (3) Joann is a knave (4) A.J. is a knight"
    assert kk.parse_answer(text, names) == (K, V, V, K)
    assert kk.parse_answer(text, list(reversed(names))) == (K, V, V, K)


def test_an_answer_that_lists_both_roles_earns_nothing():
    """A policy cannot collect the reward by hedging: every text with a person called both is None."""
    for first in ("knight", "knave"):
        for second in ("knight", "knave"):
            hedge = f"CONCLUSION:\n(1) Zoey is a {first}\n(1) Zoey is a {second}\n(2) Oliver is a knave"
            expected = None if first != second else (first == "knight", V)
            assert kk.parse_answer(hedge, ["Zoey", "Oliver"]) == expected


def test_reward_has_trl_form():
    record = kk.make_record(3, random.Random(0))
    right = f"CONCLUSION:\n{record['solution_text']}"
    wrong = f"CONCLUSION:\n{kk.solution_text([not s for s in record['solution']], record['names'])}"
    columns = {key: [value] * 3 for key, value in record.items()}
    assert kk.reward([right, wrong, "no idea"], **columns) == [1.0, 0.0, 0.0]
    chat = [[{"role": "assistant", "content": text}] for text in (right, wrong, "no idea")]
    assert kk.reward(chat, prompts=[""] * 3, completion_ids=[[1]] * 3, **columns) == [1.0, 0.0, 0.0]
    assert kk.reward([], names=[], solution=[]) == []
    with pytest.raises(ValueError, match="'solution'"):
        kk.reward([right], names=[record["names"]])
    with pytest.raises(ValueError, match="2 completions, but 1 rows"):
        kk.reward([right, wrong], names=[record["names"]], solution=[record["solution"]])


def test_records_fit_a_table_and_statements_come_back(tmp_path):
    import ast
    import json

    record = kk.make_record(4, random.Random(2))
    again = json.loads(json.dumps(record))
    assert again == record
    assert kk.solve(ast.literal_eval(again["statements"])) == [tuple(again["solution"])]


def test_demo(capsys):
    assert kk.main(["--people", "2", "--seed", "5"]) == 0
    text = capsys.readouterr().out
    names = re.search(r"You meet (\w+) and (\w+)\.", text).groups()
    statements = tuple(read_statement(s, names) for _, s in re.findall(r'(\w+) says: "(.*?)\."', text))
    assert [kk.parse_answer(text, names)] == kk.solve(statements)
    assert kk.main(["--people", "9"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not 9" in error

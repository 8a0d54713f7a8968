"""Verifiers: what counts as right, and whose mistake is named when one fails."""

import sys
from pathlib import Path

import pytest

from trimtab.errors import TaskError
from trimtab.steering.tasks import formulas
from trimtab.steering.tasks.problem import Extract
from trimtab.steering.tasks.verifiers import load_extractor, load_verifier, source_digest


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("So it is \\boxed{\\frac{1}{2}}.", "0.5", True),
        ("The answer is 42.", 42, True),
        ("The answer is 41.", 42, False),
        ("It costs $1,200.", "1200", True),
        ("It costs \\$18.", "18", True),
        ("\\boxed{\\$18}", "\\$18", True),
        ("1/2", "\\frac12", True),
        ("\\boxed{1+x}", "x+1", True),
        ("", "3", False),
        ("It is 0.00002.", 2e-05, True),
        ("It is 10000000000000000.", 1e16, True),
        ("\\boxed{2.5}", "2 1/2", True),
        ("\\boxed{1.5}", "2 1/2", False),
        ("\\boxed{0.00001}", "1e-05", True),
        ("\\boxed{1000}", "1e3", True),
        ("2 1/2", "2 1/2", True),
        ("The answer is 2 1/2.", "2 1/2", True),
        ("#### 2 1/2", "2 1/2", True),
        ("\\boxed{2 1/2}", "2 1/2", True),
        ("\\boxed{2\\frac12}", "2 1/2", True),
        ("It takes 7 1/2 hours.", 7.5, True),
        ("It takes 7 1/2 hours.", 3.5, False),
        ("It is -2 1/2.", "-2.5", True),
        ("\\boxed{\\log_2 \\frac{1}{8}}", "-3", True),
        ("The answer is \N{MINUS SIGN}18", -18, True),
        ("The answer is -18", "\N{MINUS SIGN}18", True),
        ("\\boxed{3 \N{MINUS SIGN} x}", "3-x", True),
        ("She owes -$5", "-$5", True),
        ("It is $x$-$5$.", "5", True),
        ("A half: 1/2", "1/2", True),
    ],
)
def test_math(completion: str, answer: object, right: bool) -> None:
    assert load_verifier("math")(completion, answer) == float(right)


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("####18", "18", True),
        ("The answer is 20\n#### 18", "18", True),
        ("The answer is 20\n#### 18", "20", False),
        ("#### 18\nThe answer is 20", "18", True),
        ("\\boxed{20}\n#### 18", "18", True),
        ("#### 18\n\\boxed{20}", "20", True),
        ("#### 17\n#### 18\n19", "18", True),
        ("#### $\\frac{1}{2}$", "1/2", True),
        ("It costs $4.00 + $2.00 = $<<4+2=6.00>>6.00\n#### 6", "6", True),
        ("#### 2. Add them\nThe answer is 18.", "18", True),
        ("#### **2. Add them**\nThe answer is 18.", "18", True),
        ("##### 2\nThe answer is 18.", "18", True),
        ("#### Part 2\nThe answer is 18.", "18", True),
        ("#### none\nThe answer is 18.", "18", True),
        ("\\boxed{18}, so the answer is not 20", "18", True),
        ("The answer is 18. It took 3 steps.", "18", True),
        ("It is 3, or 18", "18", True),
        ("\\boxed{A}", "A", True),
        ("It is $x + 1$", "x+1", True),
        ("It is \\(x + 1\\)", "x+1", True),
        ("The answer is A", "A", False),
        ("The answer is x + 1", "x+1", False),
    ],
)
def test_math_takes_the_mark_then_what_follows_answer_then_the_last(completion: str, answer: str, right: bool) -> None:
    assert load_verifier("math")(completion, answer) == float(right)


def test_exact_and_regex() -> None:
    assert load_verifier("exact")("0.00001", 1e-05) == 1.0
    assert load_verifier("exact")(" yes\n", "yes") == 1.0
    assert load_verifier("exact")("yes.", "yes") == 0.0
    assert load_verifier("regex")("I say yes!", r"\byes\b") == 1.0
    assert load_verifier("regex")("eyes", r"\byes\b") == 0.0


def test_a_function_of_the_users_is_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grading.py").write_text(
        "def half(completion, answer): return 0.5\n"
        "def same(completion, answer): return completion == answer\n"
        "def loud(completion, answer): return 3\n"
        "def broken(completion, answer): return answer['gone']\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_verifier("grading:half")("a", "b") == 0.5
    assert load_verifier("grading:same")("a", "a") == 1.0
    with pytest.raises(TaskError, match=r"'grading:loud' returned 3\.0"):
        load_verifier("grading:loud")("a", "b")
    with pytest.raises(TaskError, match="'grading:broken' failed on 'a': KeyError"):
        load_verifier("grading:broken")("a", {})
    with pytest.raises(TaskError, match="not a function"):
        load_verifier("grading:number")


def test_a_function_may_import_what_stands_beside_it_when_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_grading.py").write_text(
        "def same(completion, answer):\n    import late_reading\n    return late_reading.number(completion) == answer\n"
    )
    (tmp_path / "late_reading.py").write_text("def number(text): return int(text)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    installed = list(sys.path)
    assert load_verifier("late_grading:same")("3", 3) == 1.0
    load_extractor("late_grading:same")
    assert sys.path == [*installed, str(tmp_path)], "behind what is installed, and once"


@pytest.mark.parametrize("name", ["maths", "nowhere_at_all:f", "json:no_such", ":f", "json:"])
def test_a_verifier_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match="verifier"):
        load_verifier(name)


@pytest.mark.parametrize(("source", "words"), [("def f(:", "SyntaxError"), ("open('gone')", "FileNotFoundError")])
def test_a_verifiers_module_that_cannot_be_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    (tmp_path / f"grading_{words.lower()}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=f"cannot be imported: {words}: "):
        load_verifier(f"grading_{words.lower()}:f")


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("2 + 2 = 4\n#### 4", "4", True),
        ("#### $1,200 in all", 1200, True),
        ("So \\boxed{-3}. I used 7 steps.", "-3", True),
        ("#### 5\nCheck: 3 + 3", "6", False),
        ("It takes 8 packs.", "8", True),
        ("#### 3/4", "0.75", True),
        ("####\n12", "12", True),
        ("#### 5 + 3 = 8", "8", True),
        ("#### 5 + 3 = 8", "5", False),
        ("#### \N{MINUS SIGN}5", "-5", True),
        ("There are 10-12 apples", "12", True),
        ("It is -12", "-12", True),
        ("\\boxed{\\frac{3}{4}}", "0.75", True),
        ("\\boxed{-\\dfrac{3}{4}} of it", "-3/4", True),
        ("\\boxed{\\frac{3}{4}}", "3", False),
        ("\\boxed{1{,}234}", "1234", True),
        ("\\boxed{x = 12 \\text{ apples}}, from 5", "12", True),
        ("\\boxed{90^\\circ}", "90", True),
        ("\\boxed{\\$18}", "18", True),
        ("\\boxed{25 \\text{ m}^2}", "25", True),
        ("\\boxed{\\textbf{18}}", "18", True),
        ("\\boxed{\\sqrt{36}}", "36", False),
        ("\\boxed{5 \\times 3}", "5", False),
        ("\\boxed{2^4}", "2", False),
        ("\\boxed{2^4} is 16, or 2", "2", False),
        ("\\boxed{1\\frac{1}{2}}", "1.5", True),
        ("\\boxed{1 \\frac{1}{2}}", "3/2", True),
        ("#### 2 1/2", "2.5", True),
        ("#### 18 (= 3*6)", "18", True),
        ("#### 18 = 3 * 6", "18", True),
        ("#### 18 >= 10", "18", True),
        ("#### 18 (5 hours a day = 90%)", "18", True),
        ("#### 5 apples + 3 apples = 8 apples", "8", True),
        ("#### (5 + 3) * 2 = 16", "16", True),
        ("#### 3 x 4 = 12", "12", True),
        ("#### 2x = 10, so x = 5", "5", True),
        ("#### **18**", "18", True),
        ("#### _-5_", "-5", True),
        ("\\boxed{18 \\text{ for } n=3}", "18", True),
        ("\\boxed{18 \\frac{km}{h}}", "18", True),
        ("\\boxed{\\$18/hour}", "18", True),
        ("\\boxed{18\\quad}", "18", True),
        ("\\boxed{\\boldsymbol{18}}", "18", True),
        ("\\boxed{\\left(18\\right)}", "18", True),
        ("\\boxed{\\approx 18}", "18", True),
        ("\\boxed{18^{\\text{th}}}", "18", True),
        ("\\boxed{18\\\\}", "18", True),
        ("\\boxed{1,\\!234}", "1234", True),
        ("\\boxed{x_1 = 5}", "5", True),
        ("\\boxed{18 \\pi}", "18", False),
        ("\\boxed{5 + 3}", "5", False),
        ("\\boxed{7", "7", True),
        ("#### 1500001", 1500000, False),
        ("\\boxed{0}", 1e-7, False),
        ("\\boxed{(1,2)}", "12", False),
        ("\\boxed{1, 2}", "1", False),
        ("#### 1,200,000", "1200000", True),
        ("They are 5,6 and 7,8", "8", True),
        ("#### Step 2: Add\nJanet makes $18.", "18", True),
        ("\\boxed{3x}", "3", False),
        ("\\boxed{3!}", "3", False),
        ("\\boxed{x > 3}", "3", False),
        ("\\boxed{x \\geq 3}", "3", False),
        ("\\boxed{3:4}", "3", False),
        ("\\boxed{3 in}", "3", True),
        ("\\boxed{2\\frac12}", "5/2", True),
        ("\\boxed{\\frac{-1}{2}}", "-0.5", True),
        ("#### none, as 1/0 is no number", "1", False),
        ("eight", "8", False),
        ("", "8", False),
        ("#### 9007199254740993", "9007199254740992", False),
        ("#### 9007199254740993", 9007199254740992.0, False),
        ("#### 9007199254740993", 9007199254740993, True),
        ("#### 1234567", "1234567.50", False),
        ("#### 1234567", 1234567.5, False),
        ("#### 2000000", "2000001.5", False),
        ("#### 1234567.45", "1234567.5", False),
        ("#### 17.99999999", "18", False),
        ("#### 0.1250001", "1/8", False),
        ("#### 1234567.5", "1234567.50", True),
        ("#### 18.00", "18", True),
        ("#### 0.3333333", "1/3", True),
        ("#### 0.6666666", "2/3", True),
        ("#### 0.6666667", "2/3", True),
        ("#### 0.6666668", "2/3", False),
        ("#### 0.333", "1/3", False),
        ("#### 3.1415927", "3.14159265", True),
        ("#### 1/3", "0.3333333", True),
        ("#### 1/3", 1 / 3, True),
        ("#### 0.3", 0.1 + 0.2, True),
        ("#### 3", 3.0000000000000004, True),
        ("#### 66.666666666666666666", 200 / 3, True),
        ("They are 4\n1/2", "1/2", True),
        ("9" * 5000, "9", False),
        ("0." + "3" * 5000, "1/3", False),
    ],
)
def test_final_takes_the_marked_number_or_else_the_last(completion: str, answer: object, right: bool) -> None:
    assert load_verifier("final")(completion, answer) == float(right)


def test_extractors_read_wrong_answers_too_and_say_whether_they_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, maths, exact = (load_extractor(name) for name in ("final", "math", "exact"))
    assert final is not None
    assert maths is not None
    assert exact is not None
    assert final("#### 9007199254740993") != final("#### 9007199254740992")
    assert final("#### 0.75") == final("\\boxed{3/4}")
    assert maths("It is 2 1/2.") == maths("It is 2.5")
    assert maths("The answer is 20\n####\N{MINUS SIGN}18") == Extract("-18", True)
    assert final("#### 1,200.0") == final("so #### 1200 ") == Extract("1200", True)
    assert final("It is 7.") == Extract("7", False)
    assert final("I do not know.") is None
    assert maths("\\boxed{\\frac{1}{2}}") == Extract("0.5", True)
    assert maths("The answer is 0.5") == Extract("0.5", False)
    assert maths("\\boxed{x+1}") == maths("\\boxed{1+x}")
    assert maths("no idea") is None
    monkeypatch.setattr(formulas, "_seconds", lambda: 1)
    assert maths("\\boxed{9^{9^{9^{9}}}}") in (None, Extract("9**(9**(9**9))", True)), "a number that none computes"
    one, other = maths("\\boxed{10^{5000}}"), maths("\\boxed{10^{6000}}")
    assert one != other
    assert exact(" yes\n") == Extract("yes", True)
    assert exact(" ") is None
    assert load_extractor("regex") is None
    (tmp_path / "reading.py").write_text(
        "def right(completion, answer): return True\ndef extract(completion): return completion[0]\n"
    )
    (tmp_path / "blind.py").write_text("def right(completion, answer): return True\n")
    monkeypatch.chdir(tmp_path)
    assert load_extractor("blind:right") is None
    reading = load_extractor("reading:right")
    assert reading is not None
    assert reading("b c") == Extract("b", True)
    with pytest.raises(TaskError, match="extract of verifier 'reading:right' failed on ''"):
        reading("")


def test_a_digest_is_of_the_verifier_and_of_what_it_imports_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reads_numbers.py").write_text("def number(text): return 1\n")
    (tmp_path / "uses_numbers.py").write_text(
        "import json\nfrom reads_numbers import number\ndef right(completion, answer): return number(completion)\n"
    )
    first, built_in = source_digest("uses_numbers:right"), source_digest("final")
    assert first is not None
    assert built_in is not None
    (tmp_path / "stands_apart.py").write_text("")
    assert source_digest("uses_numbers:right") == first
    (tmp_path / "reads_numbers.py").write_text("def number(text): return 0\n")
    assert source_digest("uses_numbers:right") != first
    assert source_digest("math") == built_in


@pytest.mark.parametrize(
    "written",
    [
        "import functools\ndef _at(completion, answer, least): ...\nright = functools.partial(_at, least={})\n",
        "from grading_table import LEAST\ndef right(completion, answer): return LEAST\n",
        "def right(completion, answer):\n    import grading_table\n    return grading_table.LEAST\n",
        "from .grading_table import grade as right\n",
    ],
    ids=["partial", "constant", "inside", "elsewhere"],
)
def test_a_digest_is_of_all_that_a_verifier_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    package = f"grading_{request.node.callspec.id}"
    folder = tmp_path / package if "from ." in written else tmp_path
    folder.mkdir(exist_ok=True)
    name = f"{package}.marks" if "from ." in written else f"marks_{package}"
    file, table = folder / f"{name.rpartition('.')[2]}.py", folder / "grading_table.py"
    table.write_text("LEAST = 1\ndef grade(completion, answer): return LEAST\n")
    file.write_text(written.format(1))
    first = source_digest(f"{name}:right")
    file.write_text(written.format(2))
    table.write_text("LEAST = 0\ndef grade(completion, answer): return LEAST\n")
    assert source_digest(f"{name}:right") != first


def test_what_a_verifier_prints_is_none_of_the_answer_and_its_exit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talking.py").write_text(
        "import sys\ndef grade(c, a):\n    print(c)\n    return 1 if c else sys.exit(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_verifier("talking:grade")("said", None) == 1.0
    assert capsys.readouterr() == ("", "said\n")
    with pytest.raises(TaskError, match="'talking:grade' failed on '': SystemExit: 3"):
        load_verifier("talking:grade")("", None)

"""The code in the documentation, run page by page as a reader would, and what pages say of it.

Two claims are checked. A ``text`` block after a ``python`` block is what this prints. A comment
such as ``# (100, 2)`` after a statement is what it prints, or the shape of the array it assigns.
"""

import ast
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {path.stem: path for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md")}
NOT_RUN = ("index",)  # a sketch, of data that the reader is to think of
TIMEOUT = 900  # seconds, for machines much slower than ours
# Training amplifies differences between processors and XLA's levels of optimization. Numbers may
# differ by a fifth, or by three percent points or units of the last digit; words may not.
RTOL, UNITS = 0.2, 3

END = "\x1e"  # printed after each block
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)")
NUMBER = re.compile(r"\s*[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")
SHAPE = re.compile(r"  # (\(\d[\d, ]*\))$")


def blocks(page: str) -> list[tuple[str, str | None]]:
    """Each block of code on a page, with the text that it prints if the page says so."""
    found: list[tuple[str, str | None]] = []
    for language, text in BLOCK.findall(page):
        if language == "python":
            found.append((text, None))
        elif found:
            found[-1] = (found[-1][0], text)
    return found


def anchors(page: str) -> set[str]:
    """What a link may name of a page, made from its headings as GitHub and MyST make it."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#{1,3} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def with_shapes(code: str) -> str:
    """Code that also asserts what its comments say of shapes."""
    lines, asserts = code.splitlines(), {}
    for node in ast.parse(code).body:
        claim = SHAPE.search(lines[node.end_lineno - 1])
        if claim:
            assigned = isinstance(node, ast.Assign)
            value = ast.unparse(node.targets[0] if assigned else node.value.args[0])
            value += ".shape" if assigned else ""
            asserts[node.end_lineno] = f"\nassert {value} == {claim[1]}, {value}"
    return "".join(f"{line}{asserts.get(n, '')}\n" for n, line in enumerate(lines, 1))


def assert_prints(printed: str, expected: str) -> None:
    """Compare what is printed with what a page says, numbers within their tolerance."""
    words = [NUMBER.sub(" #", text).split() for text in (printed, expected)]
    assert words[0] == words[1], f"it prints\n{printed}\nand not\n{expected}"
    for found, told in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        unit = 1.0 if "%" in told else 10.0 ** -len(told.partition(".")[2])
        value, target = (float(text.replace(",", "").rstrip("%")) for text in (found, told))
        assert np.isclose(value, target, RTOL, UNITS * unit), f"{told} is{found} in\n{printed}"


def run(code: list[str], folder: pathlib.Path) -> list[str]:
    """Run blocks of code as one script, and return what each of them prints."""
    script = folder / "page.py"
    script.write_text(f"print({END!r})\n".join((*code, "")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(END)[:-1]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(name, marks=pytest.mark.slow)
        for name in sorted({*PAGES} - {*NOT_RUN})
        if "```python" in PAGES[name].read_text(encoding="utf-8")
    ],
)
def test_a_page_does_and_prints_what_it_says(page, tmp_path):
    code, expected = zip(*blocks(PAGES[page].read_text(encoding="utf-8")), strict=True)
    printed = run([with_shapes(block) for block in code], tmp_path)
    for found, told in zip(printed, expected, strict=True):
        if told is not None:
            assert_prints(found, told)


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("43 of 200 rows ( 21.5%)\n", "40 of 200 rows ( 20.0%)\n", True),
        ("4 of 200 rows ( 2.0%)\n", "40 of 200 rows ( 20.0%)\n", False),
        ("3 of 200 rows ( 1.5%)\n", "5 of 200 rows ( 2.5%)\n", True),
        ("elbo -8.885 (se 0.173)", "elbo -8.886 (se 0.175)", True),
        ("elbo -8.885 (se 0.173)", "elbo  8.885 (se 0.173)", False),
        ("1,000 draws", "1,000 draws", True),
        ("1,000 draws", "1,500 draws", False),
        ("0.002 nats", "0.004 nats", True),
        ("0.02 nats", "0.08 nats", False),
        ("rows are strange", "rows are novel", False),
        ("1 row", "1 row\n2 rows", False),
    ],
)
def test_what_is_printed_is_compared(printed, expected, same):
    if same:
        assert_prints(printed, expected)
    else:
        with pytest.raises(AssertionError):
            assert_prints(printed, expected)


@pytest.mark.parametrize("wrong", ["(3, 2)", "(2,)"])
@pytest.mark.parametrize("line", ["x = np.zeros(\n    (2, 3)\n)", "print(np.zeros((2, 3)).shape)"])
def test_shapes_in_comments_are_compared(line, wrong, tmp_path):
    code = f"import numpy as np\n{line}  # (2, 3)\n"
    run([with_shapes(code)], tmp_path)
    with pytest.raises(AssertionError, match=r"AssertionError: \(2, 3\)"):
        run([with_shapes(code.replace("# (2, 3)", f"# {wrong}"))], tmp_path)


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES)
def test_links_lead_somewhere(path):
    page = path.read_text(encoding="utf-8")
    for target, anchor in LINK.findall(page):
        file = path.parent / target if target else path
        assert file.is_file(), f"{path.name} links to {target}, which does not exist"
        if anchor:
            there = anchors(file.read_text(encoding="utf-8"))
            assert anchor in there, f"{path.name} links to {target}#{anchor}; there are {there}"

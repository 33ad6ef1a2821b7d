"""The code in the documentation, run page by page as a reader would."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 300  # seconds, for machines much slower than ours
LONG = pytest.param("models", marks=pytest.mark.examples)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["checks", "encoders", "families", "guide", LONG, "repair"])
def test_the_code_on_a_page_runs(page, tmp_path):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert code
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=TIMEOUT)

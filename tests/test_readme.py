"""The README's examples run as they are printed."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = {
    name: block
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    if (name := next(iter(re.findall(r"adapters import (\w+)", block)), None))
}


@pytest.mark.parametrize("name", ["linen", "nnx", "haiku", "equinox"])
def test_example(name):
    made = {}
    exec(compile(EXAMPLES[name], f"README, {name}", "exec"), made)
    assert made["plan"].counts[0][1:] == (8, 16)

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


@pytest.mark.parametrize(
    ("name", "package"), [("linen", "flax"), ("nnx", "flax"), ("haiku", "haiku"), ("equinox", "equinox")]
)
def test_example(name, package):
    pytest.importorskip(package)
    exec(compile(EXAMPLES[name], f"README, {name}", "exec"), {})

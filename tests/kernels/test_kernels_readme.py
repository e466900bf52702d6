import re
from pathlib import Path

import s2srm_kernels

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()


def test_the_examples_run():
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        assert len(example.strip().splitlines()) <= 12
        exec(compile(example, "kernels/README.md", "exec"), {})


def test_the_table_lists_every_operation():
    table = README.split("## Products")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    operations = {name for name in s2srm_kernels.__all__ if name.islower()}
    assert len(rows) == len(operations) and set(rows) == operations

"""Turn the result of the whole matrix into docs/matrix.md.

pytest tests/methods/test_matrix.py -m "full or not full" --junitxml=matrix.xml
python tests/matrix_table.py matrix.xml
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

HEAD = """# Every method on every family of networks

The result of `pytest tests/methods/test_matrix.py -m "full or not full"`, written by `tests/matrix_table.py`. A tick
means that these tests passed: the method trains for two epochs of three steps in fp32, the losses are finite, the
parameters that should change have changed and the others have not, and a second run that resumes after the first epoch
ends in the same bits; and the method trains for two epochs in bf16.

"""


def main(files):
    """Read what pytest wrote; what a later file says of a test counts."""
    cells, ranks = {}, {}
    cases = {case.get("name"): case for results in files for case in ElementTree.parse(results).iter("testcase")}
    for case in cases.values():
        failed = any(child.tag in ("failure", "error", "skipped") for child in case)
        found = re.fullmatch(r"test_(what_should_move|half_precision).*\[(.+)-(\w+)\]", case.get("name"))
        if found:
            cells.setdefault((found[2], found[3]), []).append(not failed)
        pair = re.fullmatch(r"test_two_ranks_equal_one\[(\w+)\]", case.get("name"))
        if pair:
            ranks[pair[1]] = not failed
    methods, families = (
        sorted({key[place] for key in cells}, key=lambda name: ("+" in name, name)) for place in (0, 1)
    )
    mark = {True: "✓", False: "**fails**"}
    lines = ["| method | " + " | ".join(families) + " |", "|---|" + ":-:|" * len(families)]
    for method in methods:
        fields = [cells.get((method, family), []) for family in families]
        lines.append(f"| `{method}` | " + " | ".join(mark[len(each) == 2 and all(each)] for each in fields) + " |")
    equal = " | ".join(mark[ranks.get(family, False)] for family in families)
    lines.append("| all of them: two ranks make the updates of one | " + equal + " |")
    Path(__file__).parent.parent.joinpath("docs/matrix.md").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

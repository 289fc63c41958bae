"""Turn the result of the matrix into docs/matrix.md.

pytest tests/methods/test_matrix.py -m "full or not full" --junitxml=matrix.xml
python tests/matrix_table.py matrix.xml

With results of some methods only (pytest's -k), the rows of the others stay as they are.
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

HEAD = """# Every method on MSDNet, RANet, SDN and a torchvision network

The result of `pytest tests/methods/test_matrix.py -m "full or not full"`, written by `tests/matrix_table.py`. A tick
means that these tests passed: the method trains for two epochs of three steps in fp32, the losses are finite, the
parameters that should change have changed and the others have not, and a second run that resumes after the first epoch
gives bit-identical results; and the method trains for two epochs in bf16.

"""


PAGE = Path(__file__).parent.parent / "docs/matrix.md"
RANKS = "all of them: two ranks make the updates of one"
MARK = {True: "✓", False: "**fails**"}


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
    heading, rows = written()
    families = sorted({family for _, family in cells} | {*ranks} | {*heading})
    for method in {method for method, _ in cells}:
        results = [cells.get((method, family), []) for family in families]
        rows[f"`{method}`"] = [MARK[len(each) == 2 and all(each)] for each in results]
    if ranks:
        rows[RANKS] = [MARK[ranks.get(family, False)] for family in families]
    lines = ["| method | " + " | ".join(families) + " |", "|---|" + ":-:|" * len(families)]
    for name in sorted(rows, key=lambda name: (name == RANKS, "+" in name, name)):
        lines.append(f"| {name} | " + " | ".join(rows[name]) + " |")
    PAGE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


def written():
    """Return the families, and {name: marks} of the rows, that the page has."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return (table[0][1:], {name: marks for name, *marks in table[1:]}) if table else ([], {})


if __name__ == "__main__":
    main(sys.argv[1:])

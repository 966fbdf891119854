"""What pytest's junit files in a folder say, as one small FOLDER/tests.json in their place.

    python benchmarks/junit_summary.py FOLDER

Counts for each file, the reasons of skips, and the first lines of every failure. A file that is
missing or cut short is one whose process did not come to its end; its log says where. Exit status
1 for any failure, and where no test has passed at all.
"""

from __future__ import annotations

import collections
import sys
import xml.etree.ElementTree as tree
from pathlib import Path
from typing import Any

from fused_resnet.bench.harness import write_json

FIRST = 600  # characters of a failure's message
MOST = 60  # failures of one file


def summary(path: Path) -> dict[str, Any]:
    counts: collections.Counter[str] = collections.Counter()
    skipped: collections.Counter[str] = collections.Counter()
    failures = []
    for case in tree.parse(path).iter("testcase"):
        kinds = {child.tag: child for child in case}
        found = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
        counts[found] += 1
        message = "" if found == "passed" else kinds[found].get("message", "")
        if found == "skipped":
            skipped[message[:200]] += 1
        elif found != "passed":
            failures.append({"name": case.get("name"), "message": message[:FIRST]})
    return {**counts, "skipped because": skipped, "failures": failures[:MOST]}


def main() -> int:
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {}
    for log in sorted(folder.glob("test_*.log")):
        path = log.with_suffix(".xml")
        try:
            found[log.stem] = summary(path)
            path.unlink()
        except (OSError, tree.ParseError) as error:
            found[log.stem] = {"error": 1, "did not come to its end": str(error)}
    write_json(found, folder / "tests.json")
    bad = [name for name, each in found.items() if each.get("failure") or each.get("error")]
    passed = sum(each.get("passed", 0) for each in found.values())
    print(f"{len(found)} files, {passed} tests passed; with failures: {', '.join(bad) or 'none'}")
    return int(bool(bad) or not passed)


if __name__ == "__main__":
    raise SystemExit(main())

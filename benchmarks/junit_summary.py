"""Replace pytest's junit files in a folder by one summary, FOLDER/tests.json.

    python benchmarks/junit_summary.py FOLDER

The summary has counts for each file, the reasons of skips, and the start of every failure message.
A missing or truncated file means that the process did not finish; its log shows where. Exit status
1 if any test failed, or if none passed.
"""

from __future__ import annotations

import collections
import sys
import xml.etree.ElementTree as tree
from pathlib import Path
from typing import Any

from fused_resnet.bench.harness import write_json

MAX_CHARACTERS = 600  # of a failure message
MAX_FAILURES = 60  # per file


def summary(path: Path) -> dict[str, Any]:
    counts: collections.Counter[str] = collections.Counter()
    skipped: collections.Counter[str] = collections.Counter()
    failures = []
    for case in tree.parse(path).iter("testcase"):
        kinds = {child.tag: child for child in case}
        outcome = next(
            (kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed"
        )
        counts[outcome] += 1
        message = "" if outcome == "passed" else kinds[outcome].get("message", "")
        if outcome == "skipped":
            skipped[message[:200]] += 1
        elif outcome != "passed":
            failures.append({"name": case.get("name"), "message": message[:MAX_CHARACTERS]})
    return {**counts, "skipped because": skipped, "failures": failures[:MAX_FAILURES]}


def main() -> int:
    folder = Path(sys.argv[1])
    files: dict[str, Any] = {}
    for log in sorted(folder.glob("test_*.log")):
        path = log.with_suffix(".xml")
        try:
            files[log.stem] = summary(path)
            path.unlink()
        except (OSError, tree.ParseError) as error:
            files[log.stem] = {"error": 1, "did not come to its end": str(error)}
    write_json(files, folder / "tests.json")
    bad = [name for name, each in files.items() if each.get("failure") or each.get("error")]
    passed = sum(each.get("passed", 0) for each in files.values())
    print(f"{len(files)} files, {passed} tests passed; with failures: {', '.join(bad) or 'none'}")
    return int(bool(bad) or not passed)


if __name__ == "__main__":
    raise SystemExit(main())

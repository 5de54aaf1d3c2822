"""Malformed and valid lines mixed, through the command line: is every one of them accounted for?

    python benchmarks/batch_fuzz.py [--lines 100000]

The model answers at once and is there for the sake of the files. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from batch_kills import ROOT, command, environment
from record import Results

sys.path.insert(0, str(ROOT / "tests" / "batch"))
from fuzz import assert_accounted_for, mixed
from lines import read


def main() -> None:
    """Writes the lines, has them answered, counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=None, help="folder for results")
    args = parser.parse_args()
    results = Results("batch-fuzz", {**vars(args), "out": None}, args.out)
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "in.jsonl", Path(name) / "out.jsonl"
        good, bad = mixed(source, args.lines)
        subprocess.run(command("fake", source, target)[:-2], check=True, env=environment("fake", 0.0))
        errors = target.with_suffix(".errors.jsonl")
        assert_accounted_for(target, errors, good, bad)
        reasons: Counter[str] = Counter()
        for line in read(errors):
            error = line["error"] or line["response"]["body"]["error"]
            reasons[f"{error['code']} {error['param'] or ''}".strip()] += 1
    for reason, count in reasons.most_common():
        results.add(section="failed", reason=reason, lines=count)
    figures = {
        "lines": args.lines,
        "blank": args.lines - len(good) - len(bad),
        "answered": len(good),
        "failed": len(bad),
        "reasons": len(reasons),
        "unaccounted": 0,
    }
    results.add(section="all", **figures)
    rows = "\n".join(f"- {name}: {value}" for name, value in figures.items())
    sys.stdout.write(results.close(f"# {args.lines:,} fuzzed lines\n\n{rows}\n", figures) + "\n")


if __name__ == "__main__":
    main()

"""A batch on a disk that fills up: the error, and what the files come to when there is room again.

    python benchmarks/batch_disk.py [--requests 2000] [--kib 512] [--suffix jsonl]

Needs root and Linux: OUT is on a tmpfs of so many KiB, which is enlarged after the command has failed twice. The model
answers at once and is there for the sake of the files. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from batch_kills import command, environment, size, texts
from record import Results

from batch import requests, write


def main() -> None:
    """Fills the disk, makes room, compares with a run that had room from the start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--kib", type=int, default=512)
    parser.add_argument("--suffix", choices=["jsonl", "jsonl.gz"], default="jsonl")
    parser.add_argument("--out", type=Path, default=None, help="folder for results")
    args = parser.parse_args()
    results = Results("batch-disk", {**vars(args), "out": None}, args.out)
    with tempfile.TemporaryDirectory() as name:
        folder, disk = Path(name), Path(name) / "disk"
        disk.mkdir()
        source = write(folder / "in.jsonl", requests(args.requests))
        whole, target = folder / f"whole.{args.suffix}", disk / f"out.{args.suffix}"
        quick = environment("fake", 0.0)
        subprocess.run(command("fake", source, whole), check=True, env=quick)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={args.kib}k", "tmpfs", str(disk)], check=True)
        try:
            starts = 0
            while True:
                starts += 1
                done = subprocess.run(
                    command("fake", source, target),
                    env=environment("fake", 0.0),
                    capture_output=True,
                    text=True,
                    check=False,
                )
                said = done.stderr.replace(str(disk), "DISK").strip()
                torn = target.suffix == ".jsonl" and size(target) and not target.read_bytes().endswith(b"\n")
                lines = len(texts(target))
                results.add(
                    section="start", number=starts, exit_code=done.returncode, said=said, lines=lines, torn=bool(torn)
                )
                sys.stderr.write(f"start {starts}: exit code {done.returncode}, {lines:,} lines; {said}\n")
                if done.returncode != 1 or starts > 2:
                    break
                if starts == 2:  # the first time the disk was as full as before
                    room = f"remount,size={args.kib + 2 * size(whole) // 1024}k"
                    subprocess.run(["mount", "-o", room, str(disk)], check=True)
            ours, theirs = texts(target), texts(whole)
        finally:
            subprocess.run(["umount", str(disk)], check=False)
    counts = Counter(custom_id for custom_id, _ in ours)
    figures = {
        "starts": starts,
        "exit_code": done.returncode,
        "lines": len(ours),
        "duplicates": sum(count - 1 for count in counts.values()),
        "missing": len(dict(theirs).keys() - counts.keys()),
        "different": sum(dict(ours).get(custom_id) != text for custom_id, text in theirs),
    }
    rows = "\n".join(f"- {name}: {value}" for name, value in figures.items())
    title = f"# A batch of {args.requests:,} on a disk of {args.kib:,} KiB"
    sys.stdout.write(results.close(f"{title}\n\n{rows}\n", figures) + "\n")
    if starts != 3 or done.returncode or len(ours) != args.requests or figures["duplicates"] or figures["different"]:
        sys.exit(1)


if __name__ == "__main__":
    main()

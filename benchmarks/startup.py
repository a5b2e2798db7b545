"""How long `import tiltflow` and the commands that need no library take to start.

CPU seconds of a process (user and system, so that a busy machine counts little), medians, beside
those of Python alone.

    python benchmarks/startup.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

LIMIT = 0.6
"""CPU seconds that no line may take."""

LINES = {
    "python alone": ["-c", ""],
    "import tiltflow": ["-c", "import tiltflow"],
    "tiltflow --help": ["-m", "tiltflow", "--help"],
    "tiltflow train --help": ["-m", "tiltflow", "train", "--help"],
    "tiltflow --version": ["-m", "tiltflow", "--version"],
    "tiltflow recipes": ["-m", "tiltflow", "recipes"],
}


def cpu_seconds(arguments: Sequence[str]) -> float:
    """User and system time of one Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    found = {
        name: statistics.median(cpu_seconds(line) for _ in range(rounds))
        for name, line in LINES.items()
    }
    print("| process | CPU seconds |\n| --- | --- |")
    for name, seconds in found.items():
        print(f"| `{name}` | {seconds:.2f} |")
    slow = [name for name, seconds in found.items() if seconds > LIMIT]
    if slow:
        sys.exit(f"more than {LIMIT} CPU seconds: {', '.join(slow)}")


if __name__ == "__main__":
    main()

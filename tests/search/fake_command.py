"""What `search.benchmarks.first_job` runs in the tests: a command that says what a search says, faster."""

import sys
import time


def main() -> int:
    print("reading the data of digits")
    if "--workers" not in sys.argv:
        return 2
    time.sleep(0.2)
    print(f"worker {sys.argv[sys.argv.index('--workers') + 1]}: trial 0 (base)")
    time.sleep(60)
    return 0


def broken() -> int:
    print("paredown: no such file")
    return 2

"""`paredown benchmark` without installing the command; see `search.commands.benchmark`."""

import sys
from pathlib import Path

# In the place of this folder, whose files have the names of our packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from search.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))

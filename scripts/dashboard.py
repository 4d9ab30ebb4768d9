"""`paredown dashboard` without installing the command; see `search.commands.dashboard`."""

import sys
from pathlib import Path

# In the place of this folder, whose files have the names of our packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from search.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["dashboard", *sys.argv[1:]]))

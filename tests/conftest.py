"""Where tests find each other's helpers: as `tests.search.toy_space`, and those of worker processes by name.

What workers run is pickled by module name, so it must be importable without the `tests` package.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "search"))

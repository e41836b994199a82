"""One rank of a training run that a test describes: scenario.py FILE (JSON)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.runs import scenario

if __name__ == "__main__":
    scenario.run(json.loads(Path(sys.argv[1]).read_text()))

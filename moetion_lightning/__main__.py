"""``python -m moetion_lightning``: the same as the ``moetion`` command."""

from __future__ import annotations

import sys

from moetion_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())

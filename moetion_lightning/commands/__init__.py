"""The subcommands of ``moetion``, one room each; imported when they are used."""

from __future__ import annotations

"""Tokens per expert. Installed by what uses them: partial experts, the monitor, replays that skip gradients."""

from moetion_lightning.moe.routing.counts import Routing, TokenCounts

__all__ = ["Routing", "TokenCounts"]

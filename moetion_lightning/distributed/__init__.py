"""Ranks: who holds what, who saves what, who is alive, and how bytes get from one to another.

Nothing here knows Lightning. The only room, with ``pipeline`` and ``strategies``, that may import
``torch.distributed``.
"""

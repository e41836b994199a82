"""Values in a store: large ones in pieces, each decided once; and the count of who has arrived.

TCPStore ends a connection at 8 MiB for a value.
"""

from __future__ import annotations

from moetion_lightning.distributed.bounded_store import ControlStore, StoreSilentError

__all__ = ["PIECE_BYTES", "STOP", "arrival_keys", "arrive", "put_value", "take_value", "value_keys"]

PIECE_BYTES = 1 << 20
#: Stands in place of a value that will never come.
STOP = "stop"
_BITS = 60  # of the 64 of a counter


def put_value(store: ControlStore, key: str, text: str) -> list[str]:
    """Write a value (ASCII) unless :data:`STOP` was written there first; may be repeated.

    Returns:
        Its keys; none if it was stopped.
    """
    pieces = [text[at : at + PIECE_BYTES] for at in range(0, len(text), PIECE_BYTES)] or [""]
    first = f"{len(pieces)}:{pieces[0]}"
    keys = value_keys(key, first.encode())
    for name, piece in zip(keys[1:], pieces[1:]):
        store.set(name, piece)
    # The first one last: whoever sees it finds the others.
    return [] if store.compare_set(key, "", first) == STOP.encode() else keys


def value_keys(key: str, first: bytes) -> list[str]:
    """The keys of a value.

    Args:
        key: The value's key.
        first: What that key holds.
    """
    return [key, *(f"{key}.{number}" for number in range(1, int(first.partition(b":")[0])))]


def take_value(store: ControlStore, key: str, first: bytes) -> str:
    """The whole of a value; arguments as of :func:`value_keys`."""
    more = [store.get(name) for name in value_keys(key, first)[1:]]
    return b"".join([first.partition(b":")[2], *more]).decode()


def arrive(store: ControlStore, key: str, index: int, size: int) -> bool:
    """Say that a member has arrived.

    Each member has a bit of its own in a counter, so that one whose connection breaks can see whether it was counted.

    Args:
        store: Where arrivals are counted.
        key: Of the occasion; each member calls this once.
        index: Number of the member, from 0.
        size: Number of members.

    Returns:
        Whether all have arrived; one member at least is told so.
    """
    word, bit = divmod(index, _BITS)
    words = -(-size // _BITS)
    full = (1 << min(_BITS, size - _BITS * word)) - 1
    try:
        seen = store.add(f"{key}/count{word}", 1 << bit)
    except StoreSilentError:
        seen = store.add(f"{key}/count{word}", 0)
        if not seen >> bit & 1:
            seen = store.add(f"{key}/count{word}", 1 << bit)
    if seen != full or words == 1:
        return bool(seen == full)
    store.set(f"{key}/full{word}", "1")
    return store.check([f"{key}/full{number}" for number in range(words)])


def arrival_keys(key: str, size: int) -> list[str]:
    """The keys that :func:`arrive` makes."""
    words = range(-(-size // _BITS))
    return [f"{key}/count{word}" for word in words] + [f"{key}/full{word}" for word in words if len(words) > 1]

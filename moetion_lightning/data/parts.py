"""The parts of a loader."""

from __future__ import annotations

__all__ = ["batch_size_of", "length_of", "loader_parts"]


def loader_parts(loader: object) -> dict[str, object]:
    """What a loader draws by, by role: sampler, batch sampler, dataset, and what these wrap."""
    parts: dict[str, object] = {"loader": loader}
    for role in ("sampler", "batch_sampler", "dataset"):
        part = getattr(loader, role, None)
        if part is not None:
            parts[role] = part
    role, batches = "batch_sampler", parts.get("batch_sampler")
    while (dealt := getattr(batches, "batch_sampler", None)) is not None:  # it deals out another one's (Accelerate)
        role, batches = f"inner_{role}", dealt
        parts[role] = batches
    inner = getattr(batches, "sampler", None)
    if inner is not None:
        parts["inner_sampler"] = inner
    for role in ("sampler", "inner_sampler"):  # Lightning's DistributedSamplerWrapper deals out one, as a dataset
        wrapped = getattr(getattr(parts.get(role), "dataset", None), "_sampler", None)
        if wrapped is not None:
            parts[f"{role}.wrapped"] = wrapped
    _add_wrapped(parts, "dataset")
    return parts


def _add_wrapped(parts: dict[str, object], role: str, depth: int = 4) -> None:
    """Datasets wrap datasets: ``Subset``, ``ConcatDataset``."""
    owner = parts.get(role)
    for attribute in ("dataset", "datasets"):
        inner = getattr(owner, attribute, None)
        for index, item in enumerate(inner if isinstance(inner, (list, tuple)) else [inner]):
            name = f"{role}.{attribute}{index}"
            if item is not None and hasattr(item, "__dict__") and depth:
                parts[name] = item
                _add_wrapped(parts, name, depth - 1)


def length_of(loader: object) -> int | None:
    """Batches of a pass; None of a stream."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def batch_size_of(loader: object) -> int | None:
    """Samples of a batch, where the loader has a fixed number."""
    size = getattr(loader, "batch_size", None)
    return size if type(size) is int else None

"""Hooks on an optimizer's ``step``, whether it has torch's or not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from moetion_lightning.errors import ConfigurationError

__all__ = ["hook_steps"]


def _nothing(*args: Any) -> None:
    return None


def hook_steps(
    optimizer: Any, before: Callable[..., Any] = _nothing, after: Callable[..., None] = _nothing
) -> list[Any]:
    """Call functions around each ``step`` of an optimizer.

    A class that only behaves like an optimizer, or whose ``__init__`` never called its base's, has none of torch's
    hooks: its ``step`` is wrapped on the instance.

    Args:
        optimizer: A torch optimizer, or what behaves like one.
        before: Called with the optimizer, the arguments (the optimizer first) and the keyword arguments; may return
            both changed.
        after: Likewise, behind it.

    Returns:
        Handles; their ``remove()`` undoes it.

    Raises:
        ConfigurationError: The steps cannot be seen.
    """
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    return [_Wrapped(optimizer, before, after)]


class _Wrapped:
    """A ``step`` that is wrapped on its instance."""

    def __init__(self, optimizer: Any, before: Callable[..., Any], after: Callable[..., None]) -> None:
        self._optimizer = optimizer
        original = optimizer.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            changed = before(optimizer, (optimizer, *args), kwargs)
            if changed is not None:
                (_, *args), kwargs = changed
            result = original(*args, **kwargs)
            after(optimizer, (optimizer, *args), kwargs)
            return result

        self._step = step
        self._replaced = getattr(optimizer, "__dict__", {}).get("step")
        try:
            optimizer.step = step
        except AttributeError as error:
            raise ConfigurationError(
                f"the optimizer {type(optimizer).__name__} has neither torch's step hooks nor a step that can be "
                "replaced, so its steps cannot be seen. Derive it from torch.optim.Optimizer and call "
                "super().__init__() in its __init__, or drop its __slots__."
            ) from error

    def remove(self) -> None:
        """Put the original back, unless somebody else has wrapped it since."""
        own = vars(self._optimizer)
        if own.get("step") is self._step:
            if self._replaced is None:
                del own["step"]
            else:
                own["step"] = self._replaced

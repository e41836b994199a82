"""Sentences about where two runs part, its likely cause, and what to change."""

from __future__ import annotations

from moetion_lightning.engine.replay_check import Difference, Suspects, likely_causes
from moetion_lightning.testing.divergence import Divergence

__all__ = ["NAMES", "causes", "remedy", "where"]

NAMES = {
    "inputs": "model inputs",
    "settings": "optimizer settings",
    "losses": "losses",
    "gradient": "gradients",
    "optimizer": "optimizer state",
    "parameter": "parameters",
    "buffer": "buffers",
    "rng": "random generators",
}
#: Keys of :mod:`moetion_lightning.engine.replay_check`.
_RECORD_KEYS = {"inputs": "batches", "settings": "lrs", "losses": "losses", "gradient": "gradients", "rng": "rng"}
_BEGINS_APART = (
    "the runs do not begin alike: another seed or none, so that initial weights or the order of the data differ"
)
_SEED = (
    "Seed with a fixed seed first, before the model and the data are made: lightning.seed_everything(1, workers=True), "
    "accelerate.utils.set_seed(1) or torch.manual_seed(1). A seed from the time is another one each time."
)
_VARIES = "something that is not the same in every run: the time, a process id, the system's random source, "
#: Causes where nothing has failed.
_IN_EVERY_RUN = {
    "inputs": f"the data follow from {_VARIES}generators without a seed, files, or which worker is the first",
    "settings": f"learning rates or other settings follow from {_VARIES}or files",
    "rng": f"how often the generators are drawn from follows from {_VARIES}or files",
}
_COMPUTES_ANEW = (
    f"the step computes something else from what was equal before it: from {_VARIES}a generator of its own; or by "
    "kernels that are not deterministic (torch.use_deterministic_algorithms(True) names them)"
)
_REPRODUCE = (
    "Let what a step computes follow from the seed, the data and the step alone. "
    "torch.use_deterministic_algorithms(True) names kernels that are not deterministic."
)
_COUNTS_ITSELF = (
    "a loop that counts its steps or epochs for itself begins to count anew in a restart, and draws its data elsewhere"
)
_LET_COUNT = (
    "A loop of your own: let it be counted, by run = attach(accelerator) (or SparseCheckpointing) and "
    "`for step, batch in run.steps(loader)`."
)
_REMEDIES = {
    "inputs": (
        "Let what a sample is follow from its index, seeds and restored generators alone. What counts or remembers "
        "belongs into an attribute of the dataset, DataModule or sampler, or into a state_dict(): not into a global "
        "variable, a class attribute, a file, or the time."
    ),
    "settings": (
        "Let every scheduler be known: return it from configure_optimizers, give it to accelerator.prepare(), or to "
        "run.track(). What sets learning rates by hand must follow from the step, not from a counter of the script."
    ),
    "losses": (
        "State that the loss depends on must be in parameters, buffers or plain attributes of the module, not in "
        "global variables. Labels and masks must follow from the sample. Else switch on "
        "torch.use_deterministic_algorithms(True): it names kernels that are not deterministic."
    ),
    "gradient": "Gradients must come from the losses alone; torch.use_deterministic_algorithms(True) names kernels.",
    "optimizer": "An optimizer must keep its state in .state or state_dict(); gradients come from the losses alone.",
    "parameter": "Change parameters by the optimizers, or in hooks that follow from the state, not from a counter.",
    "buffer": "Buffers must follow from what the module sees: update them in forward, in place.",
    "rng": (
        "Seed once, at the beginning, with a fixed seed; draw nothing that only a first start or a restart draws; "
        "keep generators of your own where they are found: attributes of module, dataset or DataModule."
    ),
    "steps": (
        "The number of steps must not depend on time, on a counter of the script, or on how often it was started. "
        + _LET_COUNT
    ),
}


def where(divergence: Divergence, first: str, second: str) -> list[str]:
    """What differs, as a few lines.

    Args:
        divergence: Where they part.
        first: What the first run is called.
        second: What the second one is called.
    """
    d = divergence
    rank = f", rank {d.rank}" if d.rank else ""
    if d.quantity == "steps":
        return [f"step {d.step}{rank} was {d.name} by {first} (its {d.first}), unlike {second} (its {d.second})"]
    how = " in the replay" if d.is_replay else ""
    by = f", as start {d.start} of {first} executed it{how}" if d.start else ""
    lines = [
        f"step {d.step}{rank}{by}: {NAMES[d.quantity]}, {d.name.removeprefix(d.quantity + ':')}",
        f"  {first}: {d.first}",
        f"  {second}: {d.second}",
    ]
    if d.others:
        lines.append(f"  {d.others} more {'value differs' if d.others == 1 else 'values differ'} in this step")
    if d.equal:
        names = {**NAMES, "rng": f"{NAMES['rng']} (without {', '.join(d.skipped)})"} if d.skipped else NAMES
        lines.append(f"  still equal in this step: {', '.join(names[quantity] for quantity in d.equal)}")
    return lines


def causes(divergence: Divergence) -> list[str]:
    """Likely causes, the most specific first."""
    d = divergence
    if d.begins_apart:
        return [_BEGINS_APART]
    if d.quantity == "steps":
        return ["one of the runs ended earlier, or counted its steps differently"]
    if d.is_undisturbed:
        return [_IN_EVERY_RUN.get(d.quantity, _COMPUTES_ANEW)]
    key = _RECORD_KEYS.get(d.quantity, "weights")
    difference = Difference(quantity=key, recorded=d.second, replayed=d.first, where=d.name)
    compared = [_RECORD_KEYS.get(quantity, "weights") for quantity in d.equal]
    found = likely_causes([difference], compared, Suspects())
    return [*found, _COUNTS_ITSELF] if _may_count_itself(d) else found


def _may_count_itself(divergence: Divergence) -> bool:
    """Whether behind a restart other data are drawn from generators that stand elsewhere."""
    d = divergence
    return not d.is_undisturbed and "rng" in d.parted and d.quantity in ("inputs", "losses", "rng")


def remedy(divergence: Divergence) -> str:
    """What to change."""
    if divergence.begins_apart:
        return _SEED
    if divergence.is_undisturbed and divergence.quantity not in ("steps", *_IN_EVERY_RUN):
        return _REPRODUCE
    change = _REMEDIES[divergence.quantity]
    return f"{change} {_LET_COUNT}" if _may_count_itself(divergence) else change

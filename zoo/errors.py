"""The errors that users see: what was found, what is allowed, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UnknownNameError(ValueError):
    """A name that is not among the allowed ones; the message offers the nearest."""

    def __init__(self, kind: str, found: object, allowed: Iterable[str], hint: str = "") -> None:
        """Compose the sentence.

        Args:
            kind: What the name stands for, e.g. `"checkpoint"`.
            found: The name that was given.
            allowed: All names that would have been accepted.
            hint: A last sentence that says what to run or read.
        """
        names = sorted(allowed)
        near = get_close_matches(str(found), names, n=3, cutoff=0.5)
        parts = [f"Unknown {kind} {str(found)!r}."]
        if near:
            parts.append(f"Did you mean {' or '.join(repr(name) for name in near)}?")
        shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
        parts.append(f"Allowed: {shown}." if names else "There is none to choose from.")
        if hint:
            parts.append(hint)
        super().__init__(" ".join(parts))


class DataNotFoundError(FileNotFoundError):
    """Data that is not where it was looked for."""

    def __init__(self, what: str, looked_in: Iterable[object], how_to_get: str) -> None:
        """Compose the sentence.

        Args:
            what: The data in words, e.g. `"the EMNIST images"`.
            looked_in: Every place that was tried, in order.
            how_to_get: A sentence that says what to run or set.
        """
        places = ", ".join(str(place) for place in looked_in)
        looked = f"Looked in: {places}." if places else "No folder was named."
        super().__init__(f"Could not find {what}. {looked} {how_to_get}")


class CheckpointError(ValueError):
    """A checkpoint folder whose content is incomplete, altered or does not fit its class."""

"""Unusable samples: how many a run may meet, counted over all its processes, and the file that lists them."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

from autoencoder.common.config import UserError
from autoencoder.sources.spans import one_at_a_time

logger = logging.getLogger(__name__)

MAX_ERRORS = 0.01  # share of the data
FEWEST_ERRORS = 16  # that a share stands for, however small the data
ANNOUNCED = 16  # failures that are told one by one; then the 32nd, 64th, …
FILE_NAME = "unusable.jsonl"  # in a run's folder


class Failures:
    """The unusable samples of one run.

    Without a file each process counts its own. With one (`keep_in`), every process appends what it meets and reads what
    the others have met, so that the limit is one for all processes, data-loader workers and machines that see the file,
    and for a run that is resumed. Lines are {"source": …, "sample": number, "reason": …}.

    Args:
        max_errors: share of the data below 1, which stands for 16 samples at least; or a number of samples from 1 on; 0
            for none.
        announce: log them as they are met.

    Raises:
        UserError: a negative `max_errors`.
    """

    def __init__(self, max_errors: float = MAX_ERRORS, announce: bool = True):
        if not max_errors >= 0:
            raise UserError(f"max_errors={max_errors} must be a share of the data below 1, or a number of samples")
        self.max_errors, self.announce = max_errors, announce
        self.path: Path | None = None
        self.sources: dict[str, int] = {}  # name → number of samples
        self.reasons: dict[tuple[str, Any], str] = {}  # (source, sample) → what is wrong with it
        self._read_bytes = 0  # of the file

    @property
    def limit(self) -> int:
        """How many samples of the sources announced so far may be unusable."""
        if self.max_errors >= 1 or self.max_errors == 0:
            return int(self.max_errors)
        return max(FEWEST_ERRORS, math.ceil(self.max_errors * sum(self.sources.values())))

    def expect(self, source: str, samples: int) -> None:
        """Announce a source: a share of its samples may be unusable."""
        self.sources[source] = samples

    def keep_in(self, path: Path) -> None:
        """From now on share the count with all processes that name this file; what is known already is written."""
        self.path, known = path, self.reasons
        self.reasons, self._read_bytes = {}, 0
        self._share(known)

    def __contains__(self, sample: tuple[str, Any]) -> bool:
        return sample in self.reasons

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, source: str, sample: Any, reason: str) -> None:
        """Count a sample of a source.

        Raises:
            UserError: more are unusable than may be; quotes the first, and counts the kinds.
        """
        known = len(self)
        self._share({(source, sample): reason})
        if len(self) > self.limit:
            raise self.too_many()
        if self.announce and (len(self) <= ANNOUNCED or len(self).bit_length() > known.bit_length()):
            listed = "" if self.path is None or len(self) < ANNOUNCED else f"; all are listed in {self.path}"
            logger.warning("skipped %s (%d of at most %d%s)", reason, len(self), self.limit, listed)

    def too_many(self) -> UserError:
        """The error for more unusable samples than there may be."""
        names = ", ".join(dict.fromkeys(source for source, _ in self.reasons))
        listed = "" if self.path is None else f" and delete {self.path}, which lists them all,"
        first = "\n  ".join(list(self.reasons.values())[:3])
        return UserError(
            f"{names}: more than {self.limit} unusable samples (max_errors={self.max_errors:g} of "
            f"{sum(self.sources.values())}): {self.summary()}; repair or remove them{listed} or raise max_errors. The "
            f"first:\n  {first}"
        )

    def report(self) -> None:
        """Log at the end of a run how many samples were unusable and why; nothing if none was."""
        if self.path is not None:
            self._read()
        if self.reasons:
            listed = "" if self.path is None else f"; all are listed in {self.path}"
            logger.warning("%d unusable samples were replaced: %s%s", len(self), self.summary(), listed)

    def summary(self) -> str:
        """How many there are of each kind, the most frequent first: "3 × not a readable image, 1 × no such …"."""
        kinds = Counter(map(kind_of_failure, self.reasons.values()))
        return ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())

    def _share(self, found: dict[tuple[str, Any], str]) -> None:
        """Add to the file what it lacks, and take over what others wrote there."""
        if self.path is None:
            self.reasons |= found
            return
        self._read()
        if found.keys() <= self.reasons.keys():
            return
        with one_at_a_time(self.path):
            self._read()
            new = {sample: reason for sample, reason in found.items() if sample not in self.reasons}
            lines = [{"source": source, "sample": number, "reason": text} for (source, number), text in new.items()]
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self._read()

    def _read(self) -> None:
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a line that another machine has not finished comes next time
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                source, sample, reason = entry["source"], entry["sample"], entry["reason"]
            except (ValueError, KeyError, TypeError):  # two machines wrote at once
                continue
            if source in self.sources:  # an earlier start may have had other data
                self.reasons[source, sample] = reason


def kind_of_failure(reason: str) -> str:
    """What a reason says behind the name of the file, without the details: "not a readable image"."""
    return reason.partition(": ")[2].partition(":")[0] or reason

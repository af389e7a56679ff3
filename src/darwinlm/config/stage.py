"""Stages of a run as data, and their names in the manifest."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage: what it does, and for which step or size."""

    kind: str
    """What it does: `corpus`, `database`, `search`, `recovery`, `evaluation`, `export`, or the name of an export."""
    step: int | None = None
    """Number of its step, in all steps except the last."""
    size: str | None = None
    """Name of its size, in a family."""

    def __str__(self) -> str:
        """Return the name in the manifest, log lines and errors: `search`, `step 1: search`, `0.8: search`."""
        if self.step is not None:
            return f"step {self.step}: {self.kind}"
        return self.kind if self.size is None else f"{self.size}: {self.kind}"

    @classmethod
    def parse(cls, name: str) -> "Stage":
        """Return the stage with this name."""
        group, _, kind = name.rpartition(": ")
        step = re.fullmatch(r"step (\d+)", group)
        return cls(kind, int(step[1])) if step else cls(kind, size=group or None)

    def affects(self, later: "Stage") -> bool:
        """Whether `later`, a stage after this one, depends on the outputs of this one."""
        # Sizes of a family only depend on each other's search.
        return self.size is None or self.kind == "search" or later.size == self.size

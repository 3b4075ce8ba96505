"""What the demo measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["base", "expert", "merge"]


@dataclass(frozen=True)
class Row:
    """One backbone: its accuracy, from 0 to 1, in each task. An expert has the name of its task."""

    name: str
    kind: Kind
    accuracy: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The mean over the tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True)
class Results:
    """All backbones. `tasks` maps names to questions; `images` is how many were tested on."""

    tasks: Mapping[str, str]
    images: int
    rows: tuple[Row, ...]

    @property
    def best_merge(self) -> Row:
        """The merge of the highest mean."""
        return max((row for row in self.rows if row.kind == "merge"), key=lambda row: row.mean)

    def record(self) -> dict[str, Any]:
        """JSON-able values."""
        rows = [{"name": row.name, "kind": row.kind, "accuracy": dict(row.accuracy)} for row in self.rows]
        return {"tasks": dict(self.tasks), "images": self.images, "rows": rows}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Results:
        """The inverse of `record`."""
        rows = tuple(Row(row["name"], row["kind"], row["accuracy"]) for row in record["rows"])
        return Results(record["tasks"], record["images"], rows)

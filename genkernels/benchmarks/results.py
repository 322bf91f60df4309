"""What a run found, as the table, the JSON file and the picture take it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class Row:
    """One provider on one case; the fields down to `parted` are the JSON's."""

    case: str
    shape: list[int]
    dtype: str
    direction: str
    provider: str
    gate: str
    median_s: float | None = None
    q20_s: float | None = None
    q80_s: float | None = None
    peak_bytes: int | None = None
    bytes: int = 0
    flops: int = 0
    share_of_peak: float | None = None
    same_as: str = ""  #: the provider that does the very same; both have the samples of both
    parted: str = ""  #: where rounding led its fp32 losses away from the reference's; the gate held it in fp64 then
    fault: str = ""
    ours: bool = False

    def to_json(self) -> dict:
        values = asdict(self)
        del values["fault"], values["ours"]
        for name in ("same_as", "parted"):
            if not values[name]:
                del values[name]
        return values

    @property
    def title(self) -> str:
        return "  ".join((self.case, "×".join(map(str, self.shape)), self.dtype, self.direction))


@dataclass
class Results:
    """A run: the machine, the rows in the order of the table, and what was left out and why."""

    machine: dict
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def ours_fail(self) -> bool:
        return any(row.ours and row.gate == "fail" for row in self.rows)

    def to_json(self) -> dict:
        faults = [f"{row.title}: {row.provider} fails the gate: {row.fault}" for row in self.rows if row.fault]
        return {"machine": {**self.machine, "notes": self.notes + faults}, "rows": [row.to_json() for row in self.rows]}


def milliseconds(seconds: float) -> str:
    """Four significant digits, no exponent."""
    value = seconds * 1e3
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"

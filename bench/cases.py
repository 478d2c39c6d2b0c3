"""Cases of the benchmark: workloads, contestants and claims.

A case is a workload with its contestants, which take the same steps on the same rows from the same first adapter, in turn. A claim
bounds a ratio between two of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Workload:
    """base: "embedded", "gpt2" or "bert". rows: "uniform" (batch x length, half supervised) or "ragged"."""

    base: str = "embedded"
    rows: str = "uniform"
    batch: int = 8
    length: int = 128


@dataclass(frozen=True)
class Contestant:
    """One contestant.

    Attributes:
        engine: a file of ``bench/workers``.
        form: a variant of the engine.
        alike: number of steps whose losses must equal the first contestant's.
    """

    name: str
    engine: str
    dtype: str = "bfloat16"
    method: str = "lora"
    r: int = 8
    dropout: float = 0.0
    checkpointing: bool = False
    form: str = ""
    alike: int = 0

    @property
    def peer(self) -> bool:
        """True if it runs in the peers' environment."""
        return self.engine in ("plain", "trl")


@dataclass(frozen=True)
class Claim:
    """``over`` divided by ``under``, of seconds a step or of bytes, is at least or at most ``bound``."""

    over: str
    under: str
    bound: float
    least: bool = True
    of: str = "seconds"

    def __str__(self) -> str:
        return f"{self.of}: {self.over} / {self.under} {'>=' if self.least else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Case:
    """The other contestants are compared with the first."""

    name: str
    workload: Workload
    contestants: tuple[Contestant, ...]
    claims: tuple[Claim, ...] = field(default=())
    extra: tuple[Contestant, ...] = ()
    """Contestants that run only when named."""


_VENEER = Contestant("veneer", "veneer")
_PEFT = Contestant("peft", "plain", alike=4)
_PEFT_LOW = Contestant("peft-lowp", "plain", form="low", alike=1)
_PEFT_FP32 = Contestant("peft-fp32", "plain", dtype="float32", alike=1)
_FLOOR = Contestant("floor", "gemms")
_FULL = Contestant("full", "plain", method="full", alike=1)
_FULL_SAME = Contestant("full-same", "full", method="full", alike=1)
_TRL = Contestant("trl", "trl", alike=4)
_TRL_SHIPPED = Contestant("trl-shipped", "trl", dtype="float32", form="shipped", checkpointing=True, alike=1)

_BESIDE_PEFT = Claim("peft", "veneer", 2.0)
_ABOVE_FLOOR = Claim("veneer", "floor", 1.6, least=False)
_MEMORY = Claim("veneer", "peft", 0.5, least=False, of="memory")


def _each(change: dict[str, object], *contestants: Contestant, ending: str = "") -> tuple[Contestant, ...]:
    return tuple(replace(one, name=one.name + ending, **change) for one in contestants)  # type: ignore[arg-type]


def _dora() -> Case:
    lora = _each({"r": 16}, _VENEER)
    dora = _each({"r": 16, "method": "dora", "alike": 1}, _VENEER, ending="-dora")
    dropped = {"r": 16, "dropout": 0.05, "alike": 1}
    both = _each(dropped, _VENEER, ending="-drop") + _each({**dropped, "method": "dora"}, _VENEER, ending="-dora-drop")
    peers = _each({"r": 16}, _PEFT) + _each({"r": 16, "method": "dora", "alike": 1}, _PEFT, ending="-dora")
    claims = (
        Claim("veneer-dora", "veneer", 1.12, least=False),
        Claim("veneer-dora-drop", "veneer-drop", 1.12, least=False),
        Claim("peft-dora", "veneer-dora", 2.0),
    )
    more = _each({**dropped, "method": "dora"}, _PEFT, ending="-dora-drop")
    return Case("dora", Workload(), lora + dora + both + peers, claims, extra=more)


def _checkpointing() -> Case:
    again = {"checkpointing": True, "alike": 4}
    return Case(
        "checkpointing",
        Workload(),
        (_VENEER, *_each(again, _VENEER, ending="-again"), *_each(again, _PEFT, ending="-again"), _PEFT),
        (Claim("peft-again", "veneer-again", 2.0),),
    )


def _fp32() -> Case:
    one, low = {"dtype": "float32"}, {"dtype": "float32", "alike": 4}
    who = _each(one, _VENEER) + _each(low, _PEFT) + _each(one, _FLOOR)
    return Case("fp32", Workload(), who, (Claim("peft", "veneer", 1.3), _ABOVE_FLOOR, _MEMORY))


def _all() -> dict[str, Case]:
    plain, more = (_VENEER, _PEFT, _FLOOR), (_PEFT_LOW, _PEFT_FP32, _FULL, _TRL, _TRL_SHIPPED)
    claims = (_BESIDE_PEFT, _ABOVE_FLOOR, _MEMORY)
    r64, dropped = {"r": 64}, {"dropout": 0.05}
    found = [
        Case("uniform", Workload(), plain, claims, extra=more),
        Case("long", Workload(batch=4, length=512), plain, claims, extra=more),
        Case(
            "ragged",
            Workload(rows="ragged"),
            (_VENEER, replace(_PEFT, alike=3), replace(_TRL, alike=3), _TRL_SHIPPED),
            (Claim("peft", "veneer", 3.0), Claim("trl", "veneer", 4.0)),
            extra=(_FLOOR, _PEFT_LOW, _PEFT_FP32, _FULL),
        ),
        # PEFT's small first steps are lost to rounding in bf16, ours agree with fp32 (docs/log/numerics.md).
        Case("r64", Workload(), _each(r64, _VENEER, replace(_PEFT, alike=1), _FLOOR), claims),
        _dora(),
        Case("dropout", Workload(), _each(dropped, _VENEER) + _each({**dropped, "alike": 1}, _PEFT), (_BESIDE_PEFT,)),
        _checkpointing(),
        Case("full", Workload(), (_VENEER, _FULL_SAME, _FULL, _PEFT, _FLOOR)),
        _fp32(),
        Case("gpt2", Workload(base="gpt2"), plain, (_BESIDE_PEFT, _ABOVE_FLOOR, _MEMORY)),
        Case("bert", Workload(base="bert"), plain, (_BESIDE_PEFT, _ABOVE_FLOOR, _MEMORY)),
    ]
    return {case.name: case for case in found}


CASES = _all()

"""The options of `hpc-router bench balance`, and what the engines and the loads are by default."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hpc_router.bench.config import Lengths, LoadClass
from hpc_router.config.schema import Roofline
from hpc_router.errors import ConfigError, suggest

TRACE: Final = "mooncake"
"""Name of the load of the trace."""
EXPERT: Final = "everything"
"""Name of the only expert, and of the engines' model."""
CLASSES: Final[Mapping[str, LoadClass]] = {
    "shared": LoadClass(
        input_words=Lengths("lognormal", mean=80, sigma=0.5, low=8, high=512),
        output_tokens=Lengths("lognormal", mean=64, sigma=0.5, low=8, high=256),
        system_words=Lengths("uniform", low=500, high=2000),
        system_prompts=64,
    ),
    "chat": LoadClass(
        turns=Lengths("uniform", low=2, high=8),
        think_s=5.0,
        input_words=Lengths("lognormal", mean=60, sigma=0.7, low=8, high=512),
        output_tokens=Lengths("lognormal", mean=120, sigma=0.5, low=16, high=512),
        system_words=Lengths("uniform", low=100, high=400),
        system_prompts=8,
    ),
    "different": LoadClass(
        input_words=Lengths("lognormal", mean=600, sigma=0.5, low=50, high=4000),
        output_tokens=Lengths("lognormal", mean=64, sigma=0.5, low=8, high=256),
    ),
}
"""The loads beside the trace: those of `bench=prefixes` and `bench=conversations`, and prompts that share nothing."""
MIXED: Final = (TRACE, "shared", "chat")
"""The loads of a run, if no others are chosen."""


@dataclass(frozen=True, slots=True)
class BalanceOptions:
    """One run. Times are in seconds of the simulated engines; `slowdown`: wall seconds per such second.

    `loads`: names of the loads that are mixed. `rates`: conversations per second of each load but the trace. `trace`: a
    file in Mooncake's format, or None;
    `trace_speed`: by which factor it is replayed faster; `trace_block`: words per block of 512 tokens. `trees`: further
    checkouts of this router by name. `environment`: the virtual environment with the routers from PyPI.
    """

    out: Path
    only: tuple[str, ...] = ()
    loads: tuple[str, ...] = MIXED
    trace: Path | None = None
    trace_speed: float = 3.0
    trace_block: int = 64
    rates: Mapping[str, float] = field(default_factory=lambda: {"shared": 6.0, "chat": 2.0, "different": 8.0})
    replicas: int = 8
    seconds: float = 20.0
    warmup_s: float = 8.0
    slowdown: float = 2.0
    seed: int = 0
    trees: Mapping[str, Path] = field(default_factory=dict)
    environment: Path | None = None
    engine: Roofline = field(
        default_factory=lambda: Roofline(model="llama3-70b", gpu="h200-sxm", quantization="fp8", slowdown=2.0)
    )

    def checked(self) -> "BalanceOptions":
        """Returns the options. Raises ConfigError for an invalid one."""
        if self.trace is not None and not self.trace.is_file():
            raise ConfigError(f"--trace {self.trace}: no such file (docs/bench.md says where traces are published)")
        for name in self.loads:
            if name not in (TRACE, *CLASSES):
                raise ConfigError(f"--loads {name}: no such load{suggest(name, (TRACE, *CLASSES))}")
        if self.replicas < 2:
            raise ConfigError(f"--replicas {self.replicas}: at least 2, so that there is a choice")
        return self

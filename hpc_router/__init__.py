"""Many specialised LLMs on a Slurm cluster behind one endpoint that sends each prompt to the expert for it."""

from typing import Final

__version__: Final = "0.1.0"

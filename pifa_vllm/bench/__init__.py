"""What was measured, by rooms: the model's quality, one layer, the served model, the GPU kernels."""

from pathlib import Path

# The committed results, which every table in a README is of.
RESULTS = Path(__file__).parent / "results"

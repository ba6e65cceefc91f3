"""This clone and its module path, so that scripts run uninstalled and from any directory.

Scripts import it first: what they import next may be in tests/, or need torchvision.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PATHS = [str(ROOT / p) for p in ("src", "kernels", "tests", ".")]
sys.path[:0] = PATHS

import torchvision_shim

# timm imports torchvision, whose wheel may be built for another torch.
torchvision_shim.install()

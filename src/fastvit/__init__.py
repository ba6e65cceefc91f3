"""A Vision Transformer on hand-written Triton kernels; see README.md."""

from fastvit import ops, reference
from fastvit.accelerate import accelerate, restore
from fastvit.backend import backend_report, use_backend
from fastvit.model import ViT
from fastvit.presets import create_model, list_models

__version__ = "0.1.0"
__all__ = [
    "ViT",
    "accelerate",
    "backend_report",
    "create_model",
    "list_models",
    "ops",
    "reference",
    "restore",
    "use_backend",
]

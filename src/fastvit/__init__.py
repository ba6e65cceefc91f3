"""A Vision Transformer on hand-written Triton kernels; see README.md."""

from fastvit import ops, reference
from fastvit.accelerate import accelerate, restore
from fastvit.backend import backend_report, use_backend
from fastvit.checkpoints import load_checkpoint, load_weights
from fastvit.export import export_checkpoint
from fastvit.model import ViT
from fastvit.param_groups import param_groups
from fastvit.presets import create_model, list_models

__version__ = "0.1.0"
__all__ = [
    "ViT",
    "accelerate",
    "backend_report",
    "create_model",
    "export_checkpoint",
    "list_models",
    "load_checkpoint",
    "load_weights",
    "ops",
    "param_groups",
    "reference",
    "restore",
    "use_backend",
]

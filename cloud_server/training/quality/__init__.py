"""How good a picture is: metrics as data, judged by a CLIP model of the owner's choice."""

from cloud_server.training.quality.alignment import (
    ALIGNMENT,
    ALIGNMENT_WEIGHT,
    DISTRACTORS,
    Alignment,
)
from cloud_server.training.quality.clip import Clip
from cloud_server.training.quality.metrics import Metric, load_metrics
from cloud_server.training.quality.scorer import QualityScorer

__all__ = [
    "ALIGNMENT",
    "ALIGNMENT_WEIGHT",
    "DISTRACTORS",
    "Alignment",
    "Clip",
    "Metric",
    "QualityScorer",
    "load_metrics",
]

"""Quality labels: prompts drawn by two models with several seeds, every picture scored."""

from cloud_server.training.labels.label import label
from cloud_server.training.labels.painters import KeptPainter, Painter, PipelinePainter
from cloud_server.training.labels.prompts import Prompt, read_prompts, sample_prompts
from cloud_server.training.labels.table import (
    Labels,
    join,
    judge_of,
    read,
    read_for_training,
    write,
)

__all__ = [
    "KeptPainter",
    "Labels",
    "Painter",
    "PipelinePainter",
    "Prompt",
    "join",
    "judge_of",
    "label",
    "read",
    "read_for_training",
    "read_prompts",
    "sample_prompts",
    "write",
]

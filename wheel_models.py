"""Build hook: a wheel carries models/starter as cloud_server/starter_models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelModels(BuildHookInterface):
    """Adds the starter models to a standard wheel; an editable one reads them in the clone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Map the folder of the clone to the one that `cloud_server.starter` looks in."""
        models = Path(self.root) / "models" / "starter"
        if version != "editable" and models.is_dir():
            build_data["force_include"][str(models)] = "cloud_server/starter_models"

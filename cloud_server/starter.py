"""Where the starter models lie: beside this package in a wheel, in `models/starter` in a clone."""

from __future__ import annotations

from pathlib import Path


def starter_folder() -> Path:
    """Return the folder that holds clip/, edge/, cloud/ and router/.

    Raises FileNotFoundError, saying how to get the models, where neither place has them.
    """
    package = Path(__file__).parent
    places = (package / "starter_models", package.parent / "models" / "starter")
    for place in places:
        if (place / "edge" / "model_index.json").is_file():
            return place
    raise FileNotFoundError(
        f"the starter models are neither in '{places[0]}' nor in '{places[1]}'; reinstall the "
        "package, run in a clone that has models/starter, or train them: cloud-server train-starter"
    )

"""Where the starter models lie: in `models/starter` of a clone, else in a wheel of their own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PACKAGE = "routet2i_edge_models"


def starter_folder() -> Path:
    """Return the folder that holds clip/, edge/, cloud/ and router/.

    Raises FileNotFoundError, saying how to get the models, where neither place has them.
    """
    # A clone's own come first: they belong to the code that is running, and train-starter renews
    # them, while the wheel may be of another version.
    clone = Path(__file__).parent.parent / "models" / "starter"
    wheel = find_spec(PACKAGE)
    installed = (wheel and wheel.submodule_search_locations) or ()
    for place in (clone, *(Path(folder) / "starter" for folder in installed)):
        if (place / "edge" / "model_index.json").is_file():
            return place
    raise FileNotFoundError(
        f"the starter models are neither in '{clone}' nor installed; install the wheel "
        "routet2i-edge-models, run in a clone that has models/starter, or train them "
        "(cloud-server train-starter) and name their folder"
    )

"""The gate back to the plain backbone: from how many pictures of history on the module is asked.

The paper bypasses the module below 3 to 5 pictures (section 4.2), and there a client who sees
every class loses by it at any length (figure 7). A device does not know its client, so the number
is the one from which on even such a client loses nothing; training among strangers (`Schedule`)
is what keeps it low. Without any history the answer is always the backbone's.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cloud_server.training.iciia.learn import Cohort, answers, stream
from cloud_server.training.iciia.module import Iciia
from cloud_server.training.iciia.samples import by_client, mixed_clients

LENGTHS = (1, 2, 3, 5, 8, 15, 30, 60)


def least_history(model: Iciia, plain: Tensor, cohort: Cohort, seed: int) -> int | None:
    """Return the length from which on the module is as often right as the backbone.

    It is that of the validation split, its clients mixed until they are all alike; `plain` (N,) is
    what the backbone names. None where not even the longest history there makes up for the module.
    """
    alike = mixed_clients(cohort.clients, cohort.splits, 0.0, seed)
    clients = by_client(alike, np.flatnonzero(cohort.splits == 1))
    least = None
    for length in reversed(LENGTHS):
        met = stream(clients, length, seed)
        if not len(met.targets):  # no client has so many
            continue
        named, labels = answers(model, cohort.features, met).argmax(-1), cohort.labels[met.targets]
        right, before = ((said.numpy() == labels).sum() for said in (named, plain[met.targets]))
        if right < before:
            break
        least = length
    return least

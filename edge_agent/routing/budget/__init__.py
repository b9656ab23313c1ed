"""A budget that is kept: the pacer shapes the cloud's share, the ledger guarantees its limits."""

"""Pictures on disk and the record each carries of how it was made."""

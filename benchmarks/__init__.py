"""Programs that print tables; the tests assert no time, only what an installation weighs."""

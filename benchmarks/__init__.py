"""Programs that print tables; nothing in here is asserted by the tests."""

"""Methods: pure functions from a network, an amount and calibration data to edits. No Lightning here."""

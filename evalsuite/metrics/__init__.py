"""Scores as pure functions of truth and prediction: no files, no models, no state."""

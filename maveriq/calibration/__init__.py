"""Fits the calibrated estimator to measurements, cross-validates it and evaluates estimators."""

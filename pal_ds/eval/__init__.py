"""Figures of an evaluation: accuracy, calibration, diagnostics, best of n, warnings, report."""

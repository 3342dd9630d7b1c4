"""Fit new users to a trained run, and measure how many comparisons that takes."""

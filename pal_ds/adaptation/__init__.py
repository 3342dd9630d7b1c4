"""Fit new users to a trained run, say how sure that is and what to ask next, and measure it by few-shot curves."""

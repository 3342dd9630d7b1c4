"""The manual does what it says: its commands run, or at least parse."""

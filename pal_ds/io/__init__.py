"""Files that are whole or absent: atomic writes, Arrow columns, points where a test may fail a write."""

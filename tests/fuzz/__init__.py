"""Readers of files on damaged input: a message for people, or the very values of the undamaged file."""

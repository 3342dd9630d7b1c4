"""The command line: one parser and one class per command."""

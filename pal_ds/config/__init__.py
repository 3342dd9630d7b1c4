"""The keys of a recipe: dataclasses, the YAML file, and the parser that reads both."""

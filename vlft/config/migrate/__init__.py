"""Translate a whole file of another kit: a shell script, a command line, or a YAML or JSON file.

`documents` finds the runs in a file, `launchers` reads the commands of a script, `settle` translates one run into flags
that `vlft.config.door` accepts, and `written` prints the result. Imports neither torch nor transformers, and needs
neither the base nor the data. `vlft.cli.translate` calls it.
"""

"""The commands, a file for each group: words in, one call each, tables out. Nobody here imports what is heavy."""

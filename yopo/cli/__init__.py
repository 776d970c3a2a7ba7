"""The command line: one thin file per command. Importing it imports no torch and no rich."""

"""The commands as functions, and the session that they share."""

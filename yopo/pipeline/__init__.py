"""What the commands do: one call each, and the session that they share."""

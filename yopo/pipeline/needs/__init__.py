"""What a command will need of memory, disk and time: estimated and checked before it starts."""

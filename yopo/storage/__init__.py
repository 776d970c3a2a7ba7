"""How results reach the disk: written aside, synced, put in place by one step."""

"""The third demo task: tickets of a few lines of symbols, in pictures of many sizes."""

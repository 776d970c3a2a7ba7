"""The second demo task: grids of colored glyphs, whose fine detail decides what they are."""

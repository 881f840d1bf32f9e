"""What the embedded model learns and how: `rules` and `puzzles` (its tasks), `tokenizer`, `training`."""

"""Does it learn as well? Every contender on the same real text, beside the papers' numbers."""

"""Fix files: what a merge changes and nothing else; it applies, comes out again, stacks, and can be proved."""

"""The evidence: do the two patches make a real, small, aligned model safer and less prone to refuse?

backbone (an aligned test bed) → derive per seed → every method beside the others (`compared`, on `measures`), overlap
of importance (`overlap`), rounds that remember (`remembering`). `data` says which prompts are whose.

The first evidence can be made again too: sweep on a development split → table on held-out prompts → continual rounds;
`steps` is their order, `report` draws and writes.
"""

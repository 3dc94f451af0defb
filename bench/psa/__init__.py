"""The evidence: do the two patches make a real, small, aligned model safer and less prone to refuse?

backbone (an aligned test bed) → derive per seed → sweep on a development split → table on held-out prompts →
continual rounds; `steps` is their order, `data` says which prompts are whose, `report` draws and writes.
"""

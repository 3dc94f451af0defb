"""Bytes on disk: checkpoints, the hub, and the write protocol. Knows no methods and no engines."""

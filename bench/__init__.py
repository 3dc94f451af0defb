"""The benchmark suite behind `safepatch bench`."""

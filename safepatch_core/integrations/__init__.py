"""Other toolchains: a file for each, which uses what `safepatch_core` shows and no more."""

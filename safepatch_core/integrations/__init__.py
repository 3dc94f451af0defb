"""Other toolchains, each on the public API alone."""

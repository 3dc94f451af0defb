"""`python -m safepatch_core` is `safepatch`."""

from safepatch_core.cli import main

main()

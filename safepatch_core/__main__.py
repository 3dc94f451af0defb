"""`python -m safepatch_core` is `safepatch`."""

from safepatch_core.commands.cli import main

main()

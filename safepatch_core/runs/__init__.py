"""What is done after what: run, rounds and sweep."""

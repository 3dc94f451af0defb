"""Models, chat formats and rows of text."""

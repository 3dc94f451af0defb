"""Weights stored as codes: which modules hold them, and the numbers that codes stand for."""

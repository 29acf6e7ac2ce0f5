"""Measurements of everything below, and the `nrrdd` command; nothing imports this package."""

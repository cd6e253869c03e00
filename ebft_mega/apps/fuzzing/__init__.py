"""Damaged and hostile input for every parser of the program, and the search for what it does to them."""

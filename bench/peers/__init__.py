"""Other programs' walks, to measure against."""

"""Negative models as files: finding, loading, mixing (Eq. 7), checking and writing them."""

"""Which experts tokens choose together, and what follows from it (C2R, arXiv:2504.01337).

Arrays and files only: neither torch nor the host is imported.
"""

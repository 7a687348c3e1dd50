"""Data sets and their three disjoint pools: what the attacker owns, what weights are
tuned on, what is private.
"""

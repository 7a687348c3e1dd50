"""How close reconstructions come, and how sure a comparison is. Only here is the ground
truth seen.
"""

"""The slicing pass in parts: fuse the norms, choose a basis and units, cut, refit; search under one budget.

Read: cutter.py (the order of things) → fuse.py → basis.py, obs.py, shrink.py → refit.py → budget.py.
"""

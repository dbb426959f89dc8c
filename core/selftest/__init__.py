"""Rehearsals of what can go wrong, F1 to F41, on the user's own machine and disk: `tightfit selftest --faults`."""

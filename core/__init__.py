"""Everything that knows how to train. It knows no card and no optimisation by name: those are in `plugins/`."""

"""Commands of `tightfit` that are not pipeline stages."""

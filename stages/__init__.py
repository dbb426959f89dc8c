"""One thin click command per DVC stage: read params, call core, write outputs."""

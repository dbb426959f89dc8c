"""What a fork server imports once, so that each life begins in a fraction of a second. It runs nothing."""

"""Speed and memory, side by side, as ratios. Each file says its command."""

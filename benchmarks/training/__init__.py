"""What benchmarks/swat.py measures: blocks, tasks, and methods held against each other."""

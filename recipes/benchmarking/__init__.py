"""The parts of `recipes/benchmark.py`: contenders, the processes they run in, what they run, and the report."""

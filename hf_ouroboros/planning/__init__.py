"""Planning a split from a configuration: what each unit costs, what fits into memory, which split is the fastest."""

"""The CFBI network as pure Flax modules and functions: arrays in, arrays out, no files."""

"""Storage of values: formats, CPU memory, transfers to devices, and the bit mix of hashes and noise."""

"""Storage of values: formats, memory, devices, and the mix function of hashes."""

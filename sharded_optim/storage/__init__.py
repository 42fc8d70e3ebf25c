"""How a value is stored: formats, memory, devices, and hashes of what is stored."""

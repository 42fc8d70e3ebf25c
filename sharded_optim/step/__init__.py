"""One optimizer step (observe, agree, update), and the state that it reads and writes."""

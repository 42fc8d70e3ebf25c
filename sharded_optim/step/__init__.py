"""One step: observe, agree, update; and the state that a step reads and writes."""

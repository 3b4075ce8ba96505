"""Twin-Merging: a shared model, compressed exclusive parts of the experts, and a router that mixes them per input."""

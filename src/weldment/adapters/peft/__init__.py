"""What `add_weighted_adapter` of PEFT does: as mathematics, and on a model in memory."""

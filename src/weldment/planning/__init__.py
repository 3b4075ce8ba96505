"""Plans: what a merge will do, from headers alone."""

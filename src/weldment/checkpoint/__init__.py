"""Opening and writing checkpoints: headers, files, layout, journal."""

"""Running statistics of batch normalisation, measured anew on unlabelled inputs."""

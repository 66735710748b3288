"""Other people's frameworks, over the public calls; each is imported on demand."""

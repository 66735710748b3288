"""What connects to other people's libraries, imported on demand."""

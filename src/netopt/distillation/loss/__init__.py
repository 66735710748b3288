"""What the student should say, and how far it is from it."""

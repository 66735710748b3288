"""Numbers that record how they were computed."""

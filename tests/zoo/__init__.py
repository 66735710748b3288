"""Small models of every kind, each with the axes its architecture allows, and the laws they all keep."""

"""What one forward says: of dimensions, of sizes, of the integers a model holds."""

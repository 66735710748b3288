"""Steps, epochs, and what they run on."""

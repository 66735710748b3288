"""What makes removing neurons the same as masking them."""

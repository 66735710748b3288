"""What a model holds, how it is run, and how it is given back."""

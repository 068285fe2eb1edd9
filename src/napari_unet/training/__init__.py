"""What is learnt from, and how."""

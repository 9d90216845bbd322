"""What the student is taught by: definitions of the losses, and their efficient forms."""

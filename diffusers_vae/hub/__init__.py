"""A finished run on the Hugging Face Hub: its model card, and the upload of what others need."""

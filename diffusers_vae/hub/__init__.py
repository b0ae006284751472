"""Publishing of a finished run on the Hugging Face Hub: its model card, and the upload of its files."""

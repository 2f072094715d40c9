"""To Hugging Face and back."""

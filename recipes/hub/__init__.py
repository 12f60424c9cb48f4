"""What is published on the Hugging Face Hub: licence, card, folder, upload."""

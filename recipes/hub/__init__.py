"""What is published on the Hugging Face Hub: license, card, folder, upload."""

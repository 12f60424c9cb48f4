"""Publishing on the Hugging Face Hub: license, model card, folder, upload."""

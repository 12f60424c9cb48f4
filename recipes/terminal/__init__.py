"""Command-line support shared by the verbs: options, output and errors."""

"""The work of the command line's verbs, and what they share; training itself lies one folder up."""

"""What all verbs share on the command line: options, tables, errors."""

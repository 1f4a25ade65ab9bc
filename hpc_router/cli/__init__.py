"""The command line: parses arguments, calls the verbs, prints results and returns exit statuses."""

"""The command line: one file a command. It asks, shows and reports; the work is done below."""
